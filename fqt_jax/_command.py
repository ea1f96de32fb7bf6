"""The command ``fqt``: runs the experiments, from a wheel as from a checkout.

``fqt finetune --dataset digits`` is ``python -m experiments.finetune --dataset digits``. In a wheel
the experiments lie inside this package, so that no package called ``experiments`` appears beside
it; processes that an experiment starts find them by ``PYTHONPATH``.
"""

from __future__ import annotations

import ast
import importlib
import os
import pathlib
import runpy
import sys

PACKAGE = pathlib.Path(__file__).parent
BUNDLED = PACKAGE / "bundled"


def main() -> None:
    """Runs the experiment that the command line names."""
    root = BUNDLED if BUNDLED.is_dir() else PACKAGE.parent
    names = experiments(root / "experiments")
    arguments = sys.argv[1:]
    if arguments in ([], ["-h"], ["--help"]):
        print(usage(names))
        return
    name, *rest = arguments
    if name == "--version":
        from fqt_jax import __version__

        print(__version__)
        return
    if name not in names:
        print(f"error: unknown command {name!r}; known: {', '.join(names)}.", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(root))
    more = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([more] if more else [])])
    os.environ["FQT_JAX_COMMAND"] = "fqt"  # for messages that say how to go on
    # What Python itself does for -m; it makes Ctrl-C clean from the first import on.
    sys.argv = ["-m", *rest]
    importlib.import_module("experiments")
    sys.argv = [f"fqt {name}", *rest]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def experiments(folder: pathlib.Path) -> dict[str, str]:
    """The experiments in a folder, by name, with the first line of what each says of itself."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        if "cli.run(" in text and path.stem != "cli":
            line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            found[path.stem] = line
    return found


def usage(names: dict[str, str]) -> str:
    """What ``fqt --help`` prints."""
    width = max(map(len, names), default=0)
    lines = [f"  {name:{width}}  {text}" for name, text in names.items()]
    return "\n".join(
        [
            "usage: fqt COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "fqt COMMAND --help tells the options, fqt --version the version.",
        ]
    )

"""Builds the documentation (``make docs``). Nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any

import latex2mathml.converter
import sphinx.util.inspect
from docutils import nodes
from flax import nnx
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
PACKAGE = "fqt_jax"

project = PACKAGE
author = copyright = "the fqt_jax maintainers"
release = importlib.import_module(PACKAGE).__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"{PACKAGE} {release}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"
highlight_language = "none"
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# As lists: as fields, several names of one line would be read as a type and a name.
GOOGLE = Config(
    napoleon_custom_sections=[("Attributes", "params_style")],
    napoleon_use_param=False,
    napoleon_use_rtype=False,
)


def write_api_pages(_: Sphinx) -> None:
    """A page for each module; those of a package are listed on its page."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    pages = {}
    for name in module_names(PACKAGE):
        title = name.replace("_", r"\_")
        lines = [title, "=" * len(title), "", f".. automodule:: {name}", "   :members:"]
        lines += ["   :show-inheritance:", ""]
        offered = exports(name)
        if offered:
            lines += [
                ".. rubric:: Offers",
                "",
                ", ".join(f":obj:`~{each}`" for each in offered),
                "",
            ]
        children = [each for each in pages_of(name) if each != name]
        if children:
            lines += [".. toctree::", "   :titlesonly:", "", *(f"   {each}" for each in children)]
        pages[f"{name}.rst"] = "\n".join([*lines, ""])
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for file, text in pages.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


@functools.cache
def module_names(package: str) -> list[str]:
    """The package and all public modules in it."""
    found = importlib.import_module(package)
    return [package, *(name for child in children(found) for name in module_names(child))]


def pages_of(package: str) -> list[str]:
    """The modules directly in a package."""
    return children(importlib.import_module(package))


def children(module: Any) -> list[str]:
    """Names of the public modules directly in a module, which may be no package."""
    found = pkgutil.iter_modules(getattr(module, "__path__", []))
    return [f"{module.__name__}.{each.name}" for each in found if not each.name.startswith("_")]


def exports(package: str) -> list[str]:
    """What a package offers that is defined in its modules."""
    module = importlib.import_module(package)
    if not hasattr(module, "__path__"):
        return []
    source = inspect.getsource(module)
    return [f"{package}.{name}" for name in re.findall(r"import (\w+) as \1$", source, re.M)]


def typeset(app: Sphinx, name: str, source: list[str]) -> None:
    """What Git hosts write otherwise than MyST, and numbers that must not be torn apart."""
    math = re.sub(r"\$`(.+?)`\$", r"{math}`\1`", source[0], flags=re.S)
    source[0] = re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", math)


def visit_math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Math as MathML, which browsers show without a script from elsewhere."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    latex = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", node.astext())  # it would become italic
    math = latex2mathml.converter.convert(latex, display=display)
    # The bars of a norm are as high as their letter, not as their line.
    self.body.append(math.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;'))
    raise nodes.SkipNode


def google_style(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Reads sections such as ``Args:``."""
    # Of a constant Napoleon would take what stands before a colon in the first line for its type.
    what = "function" if what in ("data", "attribute", "property") else what
    lines[:] = GoogleDocstring(lines, GOOGLE, app, what, name, obj, options).lines()


def module_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, *given: str | None
) -> tuple[str | None, str | None]:
    """The signature of an NNX module is that of its constructor; its metaclass hides it."""
    if what == "class" and issubclass(obj, nnx.Module):
        own = sphinx.util.inspect.signature(obj.__init__, bound_method=True)
        return sphinx.util.inspect.stringify_signature(own, unqualified_typehints=True), None
    return given[0], given[1]


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> Any:
    """Fields of a named tuple have a docstring of Python's own, which says nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """References by another name than the one under which an object is described.

    What is not described here, such as a function of another library, gets no link, but must
    exist: all other references stay errors.
    """
    if node["refdomain"] != "py":
        return None
    domain: Any = env.get_domain("py")
    for name in candidates(node):
        try:
            wanted = imported(name)
        except (ImportError, AttributeError):
            continue
        for described in list(domain.objects):
            if described.endswith(f".{name.rpartition('.')[2]}") and imported(described) is wanted:
                return domain.resolve_xref(
                    env, node["refdoc"], app.builder, "obj", described, node, content
                )
        return content
    return None


def candidates(node: pending_xref) -> Iterator[str]:
    """Full names that a reference may stand for."""
    target = node["reftarget"].replace("jax.jaxlib", "jaxlib")  # what jax.Array calls itself
    yield target
    module = node.get("py:module") or ""
    if node.get("py:class"):
        yield f"{module}.{node['py:class']}.{target}"
    while module:
        yield f"{module}.{target}"
        module = module.rpartition(".")[0]
    yield f"builtins.{target}"
    yield f"typing.{target}"


@functools.cache
def imported(name: str) -> Any:
    """The object of a dotted name. A module goes before a function of its name.

    Raises:
      ImportError, AttributeError: there is none.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ImportError(name)


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", typeset)
    app.connect("autodoc-process-docstring", google_style)
    app.connect("autodoc-process-signature", module_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", resolve)

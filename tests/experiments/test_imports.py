"""Imports within experiments point one way, and pictures have one style."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHARED = {"cli", "distributed", "process"}
MAY_IMPORT = {
    "show": set(),
    "data": SHARED,
    "runs": {"data", "show"} | SHARED,
    "bench": {"show"} | SHARED,
    "sweeps": {"runs", "data", "show"} | SHARED,
    "reports": {"sweeps", "runs", "show"} | SHARED,
}


def imports(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, wherever in it, with what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_package_has_its_place():
    assert set(MAY_IMPORT) == {p.parent.name for p in ROOT.glob("experiments/*/__init__.py")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_none_above_it(package):
    for path in (ROOT / "experiments" / package).glob("*.py"):
        own = {name.split(".")[1] for name in imports(path) if name.startswith("experiments.")}
        assert own <= MAY_IMPORT[package] | {package}, path


def test_only_the_style_saves_pictures():
    for path in ROOT.glob("experiments/**/*.py"):
        if path.name != "style.py":
            assert not any(name.startswith("matplotlib.figure") for name in imports(path)), path
            assert ".savefig(" not in path.read_text(), path

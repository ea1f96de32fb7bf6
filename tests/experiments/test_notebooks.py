"""The notebooks run from the first cell to the last."""

import pathlib
import re

import jax
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    # Its own client meets the kernel over loopback, and says that this is not encrypted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def run(notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """What the notebook prints, and the number of its pictures."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    return "".join(o.get("text", "") for o in outputs), len(pictures)


def test_the_quickstart(monkeypatch):
    notebook = nbformat.read(ROOT / "experiments" / "quickstart.ipynb", as_version=4)
    text, pictures = run(notebook, monkeypatch)
    assert pictures == 4
    assert "features/layers/3" in text
    assert "FQT1 ends" in text


def test_the_gpt(monkeypatch):
    notebook = nbformat.read(ROOT / "experiments" / "gpt.ipynb", as_version=4)
    (sizes,) = (cell for cell in notebook.cells if cell.source.startswith("WIDTH = "))
    assert len(sizes.source.splitlines()) == 4
    sizes.source = "WIDTH, BATCH, EPOCHS, SEQUENCES = 0.05, 16, 2, 64"
    text, pictures = run(notebook, monkeypatch)
    assert pictures == 1
    assert "blocks/3/attention/qkv" in text
    bits = float(re.search(r"seconds, (\S+) bits per character", text)[1])
    assert 0 < bits < 6.5  # log2 of 97 tokens is 6.6
    written = re.findall(r"^The for statement", text, re.M)
    assert len(written) == 4

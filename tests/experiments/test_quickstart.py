"""The notebook runs from its first cell to its last."""

import pathlib

import jax
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Its own client meets the kernel over loopback, and says that this is not encrypted.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    notebook = nbformat.read(ROOT / "experiments" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    text = "".join(o.get("text", "") for o in outputs)
    assert "features/layers/3" in text
    assert "FQT1 ends" in text

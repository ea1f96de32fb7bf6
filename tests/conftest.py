"""Strict settings for every test: warnings are errors, no implicit promotion, several devices."""

import functools
import gc
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx

from fqt_jax.models import MODELS, VGG

jax.config.update("jax_num_cpu_devices", 8)
# Nearly all of a test's time is compilation; the workers share what they compile.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=30, print_blob=True
)
hypothesis.settings.load_profile("default")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def relaxed_promotion() -> Iterator[None]:
    """Flax and Optax mix types and ranks in their own code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def own_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of two convolutions in place of vgg_small's six: most of a run is compilation."""
    monkeypatch.setitem(MODELS, "vgg_small", functools.partial(VGG, ((32,), (32,))))


@pytest.fixture
def graph_mode():
    """For models that share parts, which Flax's tree mode (``NNX_GRAPH_MODE=false``) refuses."""
    if not hasattr(nnx, "set_graph_mode"):
        yield
        return
    with nnx.set_graph_mode(True):
        yield

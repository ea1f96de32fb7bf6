"""What is particular to the Pallas kernels: when they run, both layouts, and that they lower."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqt_jax import PackedBits, Selection, kernels
from fqt_jax.kernels import Rounding, UnsupportedError, Window, pallas

FLAG = "FQT_JAX_PALLAS_INTERPRET"
SEED = np.array([3, 4], np.uint32)
WINDOWS = {
    "same": Window((3, 3), (1, 1), ((1, 1), (1, 1))),
    "strided": Window((3, 2), (2, 3), ((0, 1), (1, 0))),
    "wide padding": Window((2, 2), (1, 1), ((3, 2), (3, 2))),
}


def products(window, n, size, c, o, bits, rng):
    """The three products as functions of operands, with kept samples and channels."""
    x = PackedBits.pack(jnp.asarray(rng.integers(0, 2, (n, *size, c)) > 0))
    w = PackedBits.pack(jnp.asarray(rng.integers(0, 2, (*window.size, c, o)) > 0), batch_ndim=0)
    g = jnp.asarray(rng.normal(size=(n, *window.output_size(size), o)).astype(np.float32))
    k = n // 2
    weights = np.linspace(1, 2, k).astype(np.float32)
    weights[-1] = 0
    kept = Selection(jnp.arange(n - k, n, dtype=jnp.int32), jnp.asarray(weights), n)
    channels = Selection(jnp.arange(0, o, 2, dtype=jnp.int32), jnp.ones(-(-o // 2)), o)

    def rounding(size, samples, channels, groups):
        lo, value_range = np.full(size, -2.5, np.float32), np.full(size, 5, np.float32)
        return Rounding(lo, value_range, SEED, samples, channels, bits, groups)

    by_sample = rounding(k, kept, None, "samples")
    by_channel = rounding(-(-o // 2), kept, channels, "channels")
    return {
        "forward": (lambda x, w, **to: kernels.forward(x, w, window, **to), (x, w)),
        "input_grad": (
            lambda g, w, r, **to: kernels.input_grad(g, w, r, window, size, **to),
            (g, w, by_sample),
        ),
        "weight_grad": (
            lambda g, x, r, **to: kernels.weight_grad(g, x, r, window, **to),
            (g, x, by_channel),
        ),
    }


def assert_agree(cases):
    for name, (product, operands) in cases.items():
        got, expected = (
            jax.jit(functools.partial(product, implementation=each))(*operands)
            for each in ("pallas", "xla")
        )
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4, err_msg=name)


def test_not_available_on_a_cpu_unless_asked_for(monkeypatch):
    monkeypatch.delenv(FLAG, raising=False)
    message = "it runs on cuda, rocm, tpu, and the backend is cpu"
    assert kernels.implementations()["pallas"] == message
    with pytest.raises(ValueError, match=f"'pallas' is not available: {message}"):
        kernels.check_implementation("pallas")
    x = PackedBits.pack(jnp.ones((1, 1, 1, 8), bool))
    w = PackedBits.pack(jnp.ones((1, 1, 8, 8), bool), batch_ndim=0)
    with pytest.raises(UnsupportedError, match="for cpu; pallas serves cuda, rocm, tpu only"):
        kernels.forward(x, w, Window(), implementation="pallas")
    monkeypatch.setenv(FLAG, "1")
    assert kernels.implementations()["pallas"] == "available"
    assert kernels.forward(x, w, Window(), implementation="pallas").item(0) == 8
    monkeypatch.setenv(FLAG, "0")
    assert kernels.implementations()["pallas"] != "available"


@pytest.mark.parametrize(
    ("platform", "window", "bits"),
    [("cuda", "wide padding", 8), ("tpu", "same", 4), ("tpu", "strided", 8)],
)
def test_both_layouts_agree_with_the_reference(monkeypatch, rng, platform, window, bits):
    """Pallas' interpreter runs the layout of another platform here."""
    monkeypatch.setenv(FLAG, "1")
    plan = pallas._plan
    monkeypatch.setattr(pallas, "_plan", lambda _, *sizes: plan(platform, *sizes))
    assert_agree(products(WINDOWS[window], 4, (5, 4), 17, 20, bits, rng))


@pytest.mark.slow
def test_several_tiles_and_parts_of_the_contraction(monkeypatch, rng):
    monkeypatch.setenv(FLAG, "1")
    assert_agree(products(WINDOWS["same"], 8, (8, 8), 40, 72, 4, rng))


CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
DEVICES = {
    "cuda": jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="cuda"),
    "tpu": jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"),
}


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("product", ["forward", "input_grad", "weight_grad"])
def test_lowers_without_the_hardware(monkeypatch, rng, platform, product):
    """As far as Triton's and Mosaic's own languages; their compilers come with the hardware."""
    monkeypatch.delenv(FLAG, raising=False)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICES[platform])
    f, operands = products(WINDOWS["same"], 8, (8, 8), 64, 64, 4, rng)[product]
    f = functools.partial(f, implementation="pallas")
    # Only export's promise that a saved program runs years later is given up.
    unstable = jax.export.DisabledSafetyCheck.custom_call(CALLS[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(f), platforms=[platform], disabled_checks=[unstable])
        assert CALLS[platform] in exported(*operands).mlir_module()

"""Calls of the native kernels that no Python function of ours would make, and empty ones.

Each must be an error of one line, or be served. What must not end the process runs in a process of
its own, so that a crash is a failed test.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fqt_jax.kernels import native
from tests.kernels.native import calls, fuzz
from tests.kernels.native.calls import Call, Geometry

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None and shutil.which("c++") is None, reason="no C++ compiler"
)

ROOT = pathlib.Path(__file__).parents[2]


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_spoilt_calls_return_or_raise():
    run = in_a_process("-m", "tests.kernels.native.fuzz", "0", "300")
    last = run.stderr.split("\r")[-1]
    assert run.returncode == 0, f"case {last}: {run.stderr[-2000:]}"
    assert "refused" in run.stdout
    assert "returned" in run.stdout


def test_a_case_is_the_same_in_every_run():
    for case in range(60):
        a, b = fuzz.make(case), fuzz.make(case)
        assert (a.kernel, a.results, a.in_place) == (b.kernel, b.results, b.in_place)
        np.testing.assert_equal(a.attributes, b.attributes)
        np.testing.assert_equal(a.operands, b.operands)


@pytest.mark.parametrize("kernel", calls.KERNELS)
def test_calls_that_are_not_spoilt_are_served(kernel):
    for seed in range(8):
        calls.ordinary(np.random.default_rng(seed), kernel).run()


def test_every_kernel_is_called():
    from fqt_jax.kernels import _native

    assert {f"fqt_jax_{kernel}" for kernel in calls.KERNELS} == set(_native.registrations())


def geometry(**changes) -> Geometry:
    ordinary = {"n": 2, "c": 3, "o": 4, "size": (5, 5), "window": (3, 3), "strides": (1, 1)}
    return Geometry(**{**ordinary, "padding": (1, 1, 1, 1), **changes})


RNG = np.random.default_rng(0)


def conv(kernel: str, **changes) -> Call:
    return calls.CONVOLUTIONS[kernel](np.random.default_rng(0), geometry(**changes))


def scalar_weights() -> Call:
    call = calls.finish_weight_grad(RNG, (1,))
    call.operands[:2] = [a.reshape(()) for a in call.operands[:2]]
    call.results = [((), np.float32)]
    return call


def mask_without_has_mask() -> Call:
    rng = np.random.default_rng(0)
    while (call := calls.input_grad(rng, geometry())).attributes["has_mask"]:
        pass
    call.operands[7] = np.zeros((1, 7), np.uint32)
    return call


def transform(kernel: str, operand: int, shape: tuple[int, ...]) -> Call:
    call = calls.TRANSFORMS[kernel](np.random.default_rng(0), (2, 4, 4, 8))
    call.operands[operand] = np.zeros(shape, call.operands[operand].dtype)
    return call


def adam_of_other_shapes() -> Call:
    call = calls.adam(RNG, (6, 4))
    call.operands[1] = call.operands[1].reshape(24)
    call.results[1] = ((24,), np.float32)
    return call


def no_samples_of_a_huge_image() -> Call:
    """2^31 x 2^31 positions of 2^20 channels: their number overflows, and nothing has an entry."""
    far = 2**31 - 1
    g = geometry(n=0, c=2**20, o=1, size=(far, far), window=(1, 1), strides=(far, far))
    g = dataclasses.replace(g, padding=(0, 0, 0, 0))
    one = np.ones(1, np.float32)
    none = [np.zeros(0, np.int32), np.zeros(0, np.float32)]
    seed = np.zeros(2, np.uint32)
    x = np.zeros((0, 5), np.uint32)
    return Call(
        "weight_grad",
        [np.zeros((0, 1, 1, 1), np.float32), x, one, one, seed, *none, *none],
        [(g.w, np.float32)],
        {
            "sizes": g.sizes,
            "bits": np.int64(1),
            "selects_samples": False,
            "selects_channels": False,
        },
    )


def moments_of_doubtful_type(result: bool) -> Call:
    call = calls.moments(RNG, (2, 4, 4, 8))
    if result:
        call.results = [(call.results[0][0], np.int32)]
    else:
        call.operands[1] = call.operands[1].astype(np.int32)
    return call


def mostly_padding() -> Call:
    far = 2**14
    return conv("float_conv", padding=(far, far, far, far), strides=(far, far))


def draw_of_doubtful_shape(kernel: str, result: bool, shape: tuple[int, ...]) -> Call:
    """Its last operand, or its first result, of another shape."""
    call = calls.DRAWS[kernel](np.random.default_rng(0), 6)
    if result:
        call.results[0] = (shape, call.results[0][1])
    else:
        call.operands[-1] = np.zeros(shape, call.operands[-1].dtype)
    return call


MENDED = {
    "weights without an axis": (scalar_weights, "axis of output channels"),
    "a mask without has_mask": (mask_without_has_mask, "mask without has_mask"),
    "weights of rank 2": (lambda: transform("moments", 2, (0, 3)), "one for each sample"),
    "row weights of rank 2": (lambda: transform("gradient", 4, (3, 0)), "one for each sample"),
    "offsets of rank 2": (lambda: transform("activate", 2, (0, 1)), "one for each sample"),
    "nothing added of rank 2": (lambda: transform("activate", 3, (0, 1)), "added has the wrong"),
    "adam's shapes": (adam_of_other_shapes, "must have the same shape"),
    "k of rank 1": (lambda: draw_of_doubtful_shape("water_filling", False, (1,)), "k must be a"),
    "a long seed": (lambda: draw_of_doubtful_shape("systematic", False, (3,)), "be two words"),
    "indices alone": (lambda: draw_of_doubtful_shape("systematic", True, (7,)), "of one length"),
    "an operand's type": (lambda: moments_of_doubtful_type(False), "operand 1 must be float32"),
    "a result's type": (lambda: moments_of_doubtful_type(True), "result 0 must be float32"),
    "sizes that overflow": (no_samples_of_a_huge_image, "the input is too large"),
    "padding that fills the memory": (mostly_padding, "the padded image is too large"),
}


@pytest.mark.parametrize("hole", MENDED)
def test_holes_that_were_mended(hole):
    make, message = MENDED[hole]
    with pytest.raises(Exception, match=message) as caught:
        make().run()
    assert "\n" not in str(caught.value)


def _zeros(call: Call) -> None:
    for result in call.run():
        np.testing.assert_array_equal(result, np.zeros_like(result))


@pytest.mark.parametrize("kernel", calls.CONVOLUTIONS)
@pytest.mark.parametrize(
    "empty", [{"n": 0}, {"c": 0}, {"o": 0}, {"size": (0, 5), "padding": (2, 2, 1, 1)}], ids=str
)
def test_convolutions_of_nothing_are_zero(kernel, empty):
    call = conv(kernel, **empty)
    _zeros(call)


@pytest.mark.parametrize("kernel", calls.TRANSFORMS)
@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (3, 4, 4, 0)])
def test_transforms_of_nothing_are_zero(kernel, shape):
    _zeros(calls.TRANSFORMS[kernel](np.random.default_rng(0), shape))


def test_sums_over_no_kept_sample_are_zero():
    call = calls.gradient_sums(np.random.default_rng(0), (2, 4, 4, 8))
    call.attributes.update(pool=np.int64(1), selects_samples=True)
    call.operands[2:] = [np.zeros((0, 4, 4, 8), np.float32), np.zeros(0, np.int32)]
    _zeros(call)


@pytest.mark.parametrize("kernel", calls.WEIGHTS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_weights_of_nothing_are_zero(kernel, shape):
    _zeros(calls.WEIGHTS[kernel](np.random.default_rng(0), shape))


# Few entries, but extents that must not become loops or allocations.
@pytest.mark.parametrize("kernel", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("empty", [{"n": 0}, {"o": 0}])
def test_padding_of_what_is_empty_costs_nothing(kernel, empty):
    call = conv(kernel, padding=(0, 0, 0, 2**20), **empty)
    _zeros(call)

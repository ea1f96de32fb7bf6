"""What only the C++ kernels have: instruction sets, threads, raw inputs, and calls in flight.

That they compute what the others do is for the suite that all implementations share.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqt_jax as fqt
from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.kernels import native
from fqt_jax.kernels.contract import Rounding, UnsupportedError, Window
from fqt_jax.kernels.native import library
from fqt_jax.pruning import Selection

# Where there is a compiler, an extension that is missing is a failure.
pytestmark = pytest.mark.skipif(
    native.unavailable() is not None and shutil.which("c++") is None, reason="no C++ compiler"
)

forward, input_grad, weight_grad = (
    functools.partial(product, implementation="native")
    for product in (kernels.forward, kernels.input_grad, kernels.weight_grad)
)

WINDOW = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
SEED = np.array([3, 5], np.uint32)


def _operands(rng, n=9, size=7, c=37, o=70):
    x = PackedBits.pack(jnp.asarray(rng.integers(0, 2, (n, size, size, c)).astype(bool)))
    w = PackedBits.pack(jnp.asarray(rng.integers(0, 2, (3, 3, c, o)).astype(bool)), batch_ndim=0)
    return x, w, jnp.asarray(rng.standard_normal((n, size, size, o)).astype(np.float32))


def _selection(rng, size, k):
    indices = np.sort(rng.choice(size, k, replace=False)).astype(np.int32)
    weights = rng.uniform(1, 4, k).astype(np.float32)
    return Selection(jnp.asarray(indices), jnp.asarray(weights), size)


def _rounding(groups, k, bits=4, samples=None, channels=None):
    lo, value_range = jnp.full(k, -3.0, jnp.float32), jnp.full(k, 6.0, jnp.float32)
    return Rounding(lo, value_range, jnp.asarray(SEED), samples, channels, bits, groups)


def _supported():
    from fqt_jax.kernels import _native

    return _native.supported_isas()


def _products(bits, c=37):
    """All products of one layer, with pruned samples and channels, and those of floats."""
    rng = np.random.default_rng(0)
    x, w, g = _operands(rng, c=c)
    samples, channels = _selection(rng, 9, 6), _selection(rng, 70, 33)
    return [
        forward(x, w, WINDOW),
        input_grad(g, w, _rounding("samples", 6, bits, samples), WINDOW, (7, 7)),
        weight_grad(g, x, _rounding("channels", 33, bits, samples, channels), WINDOW),
        input_grad(g, w, None, WINDOW, (7, 7)),
        weight_grad(g, x, None, WINDOW),
        weight_grad(g, x, _rounding("samples", 6, bits, samples), WINDOW),
    ]


# Input channels: a quarter of the widest vector and less, a half, one, and more than one.
@pytest.mark.parametrize("c", [11, 16, 32, 37, 80])
@pytest.mark.parametrize("bits", [1, 4, 7])
def test_instruction_sets_agree_bit_for_bit(bits, c):
    from fqt_jax.kernels import _native

    best = _native.current_isa()
    expected = _products(bits, c)
    try:
        for isa in _native.supported_isas():
            _native.select_isa(isa)
            for a, b in zip(_products(bits, c), expected, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=isa)
    finally:
        _native.select_isa(best)


@pytest.mark.parametrize(("isa", "form"), [("amx", "tiles"), ("vpopcnt", "popcount")])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_all_forms_agree_bit_for_bit_with_look_up(isa, form, bits):
    from fqt_jax.kernels import _native

    if isa not in _supported():
        pytest.skip(f"no {isa} here")
    best = _native.current_isa()
    _native.select_isa(isa)
    try:
        results = []
        for each in ("look_up", form):
            _native.prefer_form(each)
            small = ("forward", 1, [3, 3, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1], 1, 8)
            assert _native.product_form(*small) == each
            results.append(_products(bits))
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        _native.prefer_form("")
        _native.select_isa(best)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"product": "adam"}, "must be forward, input_grad or weight_grad"),
        ({"sizes": [3, 3]}, "sizes must be 12 numbers"),
        ({"samples": 3}, "samples are out of range"),
        ({"channels": -1}, "channels are out of range"),
        ({"n": 2**60}, "the input is too large"),
    ],
)
def test_the_choice_of_a_kernel_checks_its_arguments(changed, message):
    from fqt_jax.kernels import _native

    arguments = {
        "product": "forward",
        "n": 2,
        "sizes": [3, 3, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1],
        "samples": 2,
        "channels": 8,
    }
    with pytest.raises(ValueError, match=message):
        _native.product_form(**(arguments | changed))


def test_a_form_has_a_known_name():
    from fqt_jax.kernels import _native

    with pytest.raises(ValueError, match="a form is look_up, popcount or tiles; not 'magic'"):
        _native.prefer_form("magic")


def _run(code, **environment):
    """The standard output of Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def test_result_does_not_depend_on_threads():
    code = """
        import hashlib, jax, numpy as np
        from tests.kernels import test_native as t
        rng = np.random.default_rng(0)
        x, w, g = t._operands(rng, n=32, size=12, c=64, o=64)
        samples = t._selection(rng, 32, 20)
        results = [
            t.forward(x, w, t.WINDOW),
            t.input_grad(g, w, t._rounding("samples", 20, 4, samples), t.WINDOW, (12, 12)),
            t.weight_grad(g, x, t._rounding("channels", 64, 4, samples), t.WINDOW),
            t.input_grad(g, w, None, t.WINDOW, (12, 12)),
            t.weight_grad(g, x, None, t.WINDOW),
        ]
        print(hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest())
    """
    digests = {_run(code, NPROC=str(n)) for n in (1, 2, 5)}
    assert len(digests) == 1


def test_an_instruction_set_can_be_forced():
    code = "from fqt_jax.kernels import _native, native; print(native.unavailable())"
    assert _run(code, FQT_JAX_ISA="portable").strip() == "None"
    chosen = "from fqt_jax.kernels import _native, native; print(_native.current_isa())"
    assert _run(chosen, FQT_JAX_ISA="portable").strip() == "portable"


@pytest.mark.parametrize(
    "use",
    [
        "fqt.implementations()",
        "fqt.conv(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 4, 4)), recipe=fqt.QAT)",
        "fqt.QuantConv(4, 4, 1, rngs=nnx.Rngs(0))",
        "adam().update(jnp.ones(3), adam().init(jnp.ones(3)))",
    ],
)
def test_an_instruction_set_that_does_not_run_is_refused_at_first_use(use):
    code = f"""
        import fqt_jax as fqt, jax.numpy as jnp
        from flax import nnx
        from fqt_jax.optimizers import scale_by_adam as adam
        try:
            {use}
        except ValueError as error:
            print(error)
    """
    allowed = ", ".join(_supported())
    message = "FQT_JAX_ISA='no-such-set' names no instruction set that runs here; allowed are "
    assert _run(code, FQT_JAX_ISA="no-such-set") == f"{message}{allowed}.\n"


def test_an_experiment_shows_a_wrong_instruction_set_as_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.finetune"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "FQT_JAX_ISA": "no-such-set"}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    run = subprocess.run(command, check=False, **options)
    assert run.returncode == 2
    assert run.stderr.startswith("error: FQT_JAX_ISA='no-such-set' names no instruction set")
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_instruction_set_without_the_extension_is_refused(monkeypatch):
    monkeypatch.setenv("FQT_JAX_ISA", "avx2")
    assert "cannot be used: it was not built" in library._select_isa("it was not built")
    monkeypatch.delenv("FQT_JAX_ISA")
    assert library._select_isa("it was not built") is None


def test_many_calls_in_flight_do_not_hang():
    rng = np.random.default_rng(0)
    x, w, g = _operands(rng, n=32, size=8, c=64, o=64)

    @jax.jit
    def step(words, g):
        total = []
        for i in range(12):  # none of them waits for another
            signs = PackedBits(words ^ jnp.uint32(i), x.shape)
            rounding = _rounding("channels", 64)
            total.append(forward(signs, w, WINDOW).astype(jnp.float32).sum())
            total.append(weight_grad(g + jnp.float32(i), signs, rounding, WINDOW).sum())
            rounding = _rounding("samples", 32)
            dx = input_grad(g * jnp.float32(i), w, rounding, WINDOW, (8, 8))
            total.append(dx.sum())
        return jnp.stack(total)

    first = step(x.words, g)
    for _ in range(20):
        np.testing.assert_array_equal(step(x.words, g), first)


def test_jit_and_vmap(rng):
    x, w, _ = _operands(rng, n=6)
    expected = forward(x, w, WINDOW)
    jitted = jax.jit(lambda words: forward(PackedBits(words, x.shape), w, WINDOW))
    np.testing.assert_array_equal(jitted(x.words), expected)
    pairs = x.words.reshape(3, 2, -1)
    mapped = jax.vmap(lambda words: forward(PackedBits(words, x.shape), w, WINDOW))(pairs)
    np.testing.assert_array_equal(mapped.reshape(expected.shape), expected)


@pytest.mark.parametrize("prune", ["channels", "shared"])
@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_of_conv_equal_those_of_xla(rng, prune, strides):
    recipe = fqt.Recipe(gradient=fqt.GradientQuantizer(bits=4, prune=prune))
    x = jnp.asarray(rng.standard_normal((12, 9, 9, 20)).astype(np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 20, 24)).astype(np.float32))
    target = jnp.asarray(rng.standard_normal((24,)).astype(np.float32))

    def grads(implementation):
        def loss(x, w):
            y = fqt.conv(
                x,
                w,
                key=jax.random.key(7),
                recipe=recipe,
                strides=strides,
                implementation=implementation,
            )
            return jnp.mean((y - target.reshape(1, 1, 1, -1)) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    # The codes agree: nothing is left but the rounding of a few float operations.
    for a, b in zip(jax.tree.leaves(grads("native")), jax.tree.leaves(grads("xla")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


def test_nan_reaches_the_result(rng):
    x, w, g = _operands(rng, n=4)
    rounding = _rounding("samples", 4)
    rounding = dataclasses.replace(rounding, lo=rounding.lo.at[2].set(jnp.nan))
    dx = input_grad(g, w, rounding, WINDOW, (7, 7))
    assert jnp.isnan(dx).all(axis=(1, 2, 3)).tolist() == [False, False, True, False]
    rounding = _rounding("channels", 70)
    ranges = rounding.value_range.at[69].set(jnp.nan)
    dw = weight_grad(g, x, dataclasses.replace(rounding, value_range=ranges), WINDOW)
    assert jnp.isnan(dw).all(axis=(0, 1, 2)).tolist() == [False] * 69 + [True]


def test_declines_what_it_does_not_serve(rng):
    x, _, g = _operands(rng, n=3)
    pruned = dataclasses.replace(_rounding("samples", 3), channels=_selection(rng, 70, 33))
    with pytest.raises(UnsupportedError, match="do not go with pruned channels"):
        weight_grad(g, x, pruned, WINDOW)


SIZES = np.array([7, 7, 37, 70, 3, 3, 1, 1, 1, 1, 1, 1], np.int64)


def _raw_forward(x, w, sizes=SIZES, shape=(4, 7, 7, 70), dtype=jnp.int16):
    call = jax.ffi.ffi_call("fqt_jax_forward", jax.ShapeDtypeStruct(shape, dtype))
    return call(x, w, sizes=sizes)


def _with(sizes, **changes):
    names = ("h", "w", "c", "o", "kh", "kw", "down", "across", "top", "bottom", "left", "right")
    return np.array([changes.get(k, v) for k, v in zip(names, sizes, strict=True)], np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: {"x": x[:, :-1]}, "words of its shape"),
        (lambda x, w: {"x": x[0]}, "words of samples"),
        (lambda x, w: {"x": x.astype(jnp.int32)}, "operand 0 must be uint32"),
        (lambda x, w: {"w": w[:-1]}, "words of its shape"),
        (lambda x, w: {"shape": (4, 7, 7, 69)}, "wrong shape"),
        (lambda x, w: {"dtype": jnp.int32}, "wrong type"),
        (lambda x, w: {"sizes": SIZES[:-1]}, "12 numbers"),
        (lambda x, w: {"sizes": _with(SIZES, kh=0)}, "window"),
        (lambda x, w: {"sizes": _with(SIZES, down=0)}, "stride"),
        (lambda x, w: {"sizes": _with(SIZES, top=-1)}, "padding"),
        (lambda x, w: {"sizes": _with(SIZES, kh=99)}, "larger than"),
        (lambda x, w: {"sizes": _with(SIZES, c=-1)}, "out of range"),
        (lambda x, w: {"sizes": _with(SIZES, c=2**40)}, "out of range"),
        (lambda x, w: {"sizes": _with(SIZES, c=2**30)}, "too many products"),
    ],
)
def test_bad_raw_operands_are_errors(rng, change, message):
    x, w, _ = _operands(rng, n=4)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            _raw_forward(**{"x": x.words, "w": w.words, **change(x.words, w.words)})
        )


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 4], "out of range"),
        ([-1, 2], "out of range"),
        ([2, 2], "must increase"),
        ([2, 1], "must increase"),
    ],
)
def test_bad_selections_are_errors(rng, indices, message):
    x, w, g = _operands(rng, n=4)
    samples = Selection(jnp.array(indices, jnp.int32), jnp.ones(2, jnp.float32), 4)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(input_grad(g, w, _rounding("samples", 2, 4, samples), WINDOW, (7, 7)))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(weight_grad(g, x, _rounding("channels", 70, 4, samples), WINDOW))


def test_empty_operands(rng):
    x, w, g = _operands(rng, n=0)
    assert forward(x, w, WINDOW).shape == (0, 7, 7, 70)
    assert input_grad(g, w, _rounding("samples", 0), WINDOW, (7, 7)).shape == (0, 7, 7, 37)
    dw = weight_grad(g, x, _rounding("channels", 70), WINDOW)
    np.testing.assert_array_equal(dw, np.zeros((3, 3, 37, 70), np.float32))


@pytest.mark.parametrize("newer", [(1, 0), (0, 1)])
def test_an_extension_of_a_newer_interface_is_refused(monkeypatch, newer):
    major, minor = library._installed_ffi_version()
    import fqt_jax.kernels._native as extension

    monkeypatch.setattr(extension, "ffi_version", lambda: (major + newer[0], minor + newer[1]))
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **_: registered.append(args))
    assert "install fqt_jax again" in library._load()
    assert not registered
    monkeypatch.setattr(extension, "ffi_version", lambda: (major, max(0, minor - 1)))
    assert library._load() is None
    assert registered


def test_an_extension_of_other_sources_is_refused(monkeypatch, tmp_path):
    assert library._load() is None
    for path in library._SOURCES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    assert library._load() is None
    (tmp_path / "job.h").write_text("// another")
    assert "other sources" in library._load()
    monkeypatch.setattr(library, "_SOURCES", tmp_path / "none")
    assert library._load() is None


HEADERS = sorted(path.name for path in library._SOURCES.glob("*.h"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", HEADERS)
def test_headers_stand_alone(header):
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I."]
    run = subprocess.run(
        [*command, "-isystem", jax.ffi.include_dir(), "-x", "c++", "-"],
        input=f'#include "{header}"\n',
        cwd=library._SOURCES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_what_is_included_in_the_kernels_is_a_fragment():
    includes = re.findall(r'#include "(.*)"', (library._SOURCES / "kernels.inc").read_text())
    assert includes
    assert all(name.endswith(".inc") for name in includes)

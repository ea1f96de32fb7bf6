"""How an operation finds its implementation, and that it behaves like any other of JAX's."""

from __future__ import annotations

import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import fqt_jax as fqt
from fqt_jax import kernels
from fqt_jax.kernels import UnsupportedError, dispatch, native
from fqt_jax.kernels.dispatch import Implementation, Kernel
from fqt_jax.sharding import varying_axes
from tests.kernels.operations import OPERATIONS, implementations, operands

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="no extension")
CASES = [(operation, name) for operation in OPERATIONS for name in implementations(operation)]
each_case = pytest.mark.parametrize(("operation", "implementation"), CASES)
each_operation = pytest.mark.parametrize("operation", OPERATIONS)

CPU, TPU = ("cpu",), ("tpu",)


def assert_equal(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_agree(got: Any, expected: Any) -> None:
    """Equal, but for what another order of summation makes of a float."""

    def check(a: jax.Array, b: jax.Array) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree.map(check, got, expected)


# The choice, among implementations made for the purpose


class Double:
    """An operation ``a -> factor * a``, and how often it was traced."""

    def __init__(self, factor: float = 2.0, declines: str | None = None):
        self.factor, self.traced, self.declined = factor, [], []
        self.why = declines

    def run(self, a: jax.Array, *, platform: str) -> jax.Array:
        self.traced.append((platform, a.shape))
        return a * jnp.float32(self.factor)

    def declines(self, a: jax.Array) -> str | None:
        self.declined.append(a.shape)
        return self.why

    def named(self, name: str, platforms: Any = dispatch.PLATFORMS, why: Any = None) -> Any:
        kernels = {"double": Kernel(self.run, self.declines)}
        return Implementation(name, kernels, lambda: platforms, lambda: why)


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(dispatch, "_IMPLEMENTATIONS", {})
    return dispatch.register


def double(a: jax.Array, implementation: str | None = None) -> jax.Array:
    out = jax.ShapeDtypeStruct(a.shape, a.dtype)
    return dispatch.dispatch("double", out, a, implementation=implementation)


ONES = jnp.ones(3)


def exported(f: Any, *args: Any, platforms: Any, **options: Any) -> str:
    return jax.export.export(jax.jit(f), platforms=platforms, **options)(*args).mlir_module()


def test_the_first_that_serves_runs_and_no_other_is_traced(register):
    declining, elsewhere, absent = Double(declines="never"), Double(), Double()
    chosen, spare = Double(3.0), Double()
    register(
        declining.named("declining"),
        elsewhere.named("elsewhere", TPU),
        absent.named("absent", why="it was not built"),
        chosen.named("chosen"),
        spare.named("spare"),
    )
    assert_equal(double(ONES), 3 * np.ones(3))
    assert [len(each.traced) for each in (declining, elsewhere, absent, spare)] == [0] * 4
    assert chosen.traced == [("cpu", (3,))]
    assert absent.declined == []


def test_a_name_is_that_implementation_or_an_error(register):
    first, second = Double(2.0), Double(3.0)
    register(first.named("first"), second.named("second"))
    assert_equal(double(ONES, "second"), 3 * np.ones(3))
    with pytest.raises(ValueError, match="unknown implementation 'third'; known: first, second"):
        double(ONES, "third")


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        (Double(declines="it is Monday").named("chosen"), "it is Monday"),
        (Double().named("chosen", why="it was not built"), "it was not built"),
        (Implementation("chosen", {}), "it has no such kernel"),
    ],
)
def test_a_name_that_does_not_serve_says_why(register, implementation, reason):
    fine = Double()
    register(fine.named("fine"), implementation)
    message = f"(?m)^no implementation serves this double; chosen: {reason}$"
    with pytest.raises(UnsupportedError, match=message):
        double(ONES, "chosen")
    with pytest.raises(UnsupportedError, match=message):
        jax.jit(double, static_argnums=1)(ONES, "chosen")
    assert not fine.traced


def test_where_none_serves_each_says_why(register):
    register(
        Double(declines="it is Monday").named("first"),
        Double().named("second", why="it was not built"),
        Implementation("third", {}),
    )
    with pytest.raises(
        UnsupportedError,
        match="first: it is Monday; second: it was not built; third: it has no such kernel",
    ):
        double(ONES)


def test_the_platform_is_that_of_the_lowering(register):
    here, there = Double(2.0), Double(3.0)
    register(there.named("there", TPU), here.named("here", ("cpu", "cuda")))
    assert "3.000000e+00" in exported(double, ONES, platforms=TPU)
    assert (here.traced, there.traced) == ([], [("tpu", (3,))])
    both = exported(double, ONES, platforms=("cpu", "tpu"))
    assert "2.000000e+00" in both
    assert "3.000000e+00" in both
    message = "^this double is lowered for rocm; here serves cpu, cuda only; there serves tpu only"
    with pytest.raises(UnsupportedError, match=message):
        exported(double, ONES, platforms=("rocm",))
    message = "^this double is lowered for cpu; there serves tpu only"
    for run in (double, jax.jit(double, static_argnums=1)):
        with pytest.raises(UnsupportedError, match=message):
            run(ONES, "there")


def test_the_same_call_compiles_once(register):
    operation = Double()
    register(operation.named("only"))
    for _ in range(3):
        double(ONES)
        double(2 * ONES, "only")
    assert operation.traced == [("cpu", (3,))]
    double(jnp.ones((2, 3)))
    assert len(operation.traced) == 2
    run = jax.jit(lambda a: double(a) + double(a + 1))
    run(ONES)
    run(ONES)
    assert len(operation.traced) == 3  # equal operations of a program are lowered once


def test_what_declines_sees_one_entry_of_a_batch(register):
    operation = Double()
    register(operation.named("only"))
    a = jnp.arange(24.0).reshape(2, 3, 4)
    out = jax.vmap(jax.vmap(double, in_axes=1, out_axes=1), out_axes=2)(a)
    assert_equal(out, 2 * np.moveaxis(np.asarray(a), 0, 2))
    assert operation.declined == [(3,)]
    assert operation.traced == [("cpu", (3,))]


def test_a_kernel_that_breaks_its_promise_is_an_error(register):
    operation = Double()
    register(operation.named("only"))

    def promise(a: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        return dispatch.dispatch("double", jax.ShapeDtypeStruct(shape, dtype), a)

    for shape, dtype in (((4,), jnp.float32), ((3,), jnp.int16)):
        with pytest.raises(TypeError, match=r"only's double makes .* was promised"):
            promise(ONES, shape, dtype)
        with pytest.raises(TypeError, match=r"only's double makes .* was promised"):
            jax.vmap(lambda a: promise(a, shape, dtype))(ONES[None])  # noqa: B023


def test_implementations_says_why_not(register):
    register(
        Double().named("fine"),
        Double().named("absent", why="it was not built"),
        Double().named("elsewhere", ("cuda", "tpu")),
    )
    assert kernels.implementations() == {
        "fine": "available",
        "absent": "it was not built",
        "elsewhere": "it runs on cuda, tpu, and the backend is cpu",
    }
    kernels.check_implementation(None)
    kernels.check_implementation("fine")
    for name, message in [
        ("absent", "'absent' is not available: it was not built"),
        ("elsewhere", "'elsewhere' is not available: it runs on cuda, tpu"),
        ("", "unknown implementation ''; known: fine, absent, elsewhere"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.check_implementation(name)


@pytest.mark.parametrize(("version", "platform"), [("cuda 12", "cuda"), ("rocm 6", "rocm")])
def test_gpus_are_told_apart(register, monkeypatch, version, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    client = types.SimpleNamespace(platform_version=version)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(client=client)])
    register(Double().named("it", (platform,)), Double().named("cpu", CPU))
    assert kernels.implementations() == {
        "it": "available",
        "cpu": f"it runs on cpu, and the backend is {platform}",
    }


# The real ones


def test_by_preference():
    assert list(kernels.implementations()) == ["native", "xla", "pallas", "packed"]
    assert kernels.implementations()["xla"] == "available"
    assert all(isinstance(reason, str) and reason for reason in kernels.implementations().values())


def test_xla_has_every_operation_and_this_table_too():
    assert set(dispatch._IMPLEMENTATIONS["xla"].kernels) == set(OPERATIONS)


@needs_native
@each_operation
def test_native_is_called_for_the_cpu_and_nowhere_else(operation):
    run, of = OPERATIONS[operation], operands(operation)
    call = f"custom_call @fqt_jax_{operation}("
    is_native = operation != "float_conv_input_grad"
    assert (call in jax.jit(run).lower(*of).as_text()) == is_native
    assert "@fqt_jax_" not in exported(run, *of, platforms=("cuda", "tpu", "rocm"))
    explicit = functools.partial(run, implementation="native")
    with pytest.raises(
        UnsupportedError,
        match=f"^this {operation} is lowered for cuda; native serves cpu only",
    ):
        exported(explicit, *of, platforms=("cuda",))


@each_operation
def test_xla_lowers_for_every_platform(operation):
    run = functools.partial(OPERATIONS[operation], implementation="xla")
    assert exported(run, *operands(operation), platforms=dispatch.PLATFORMS)


def test_a_batch_of_any_size_is_exported():
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 4, 4, 3), jnp.float32)
    run = functools.partial(fqt.conv, recipe=fqt.QAT, implementation="xla")
    saved = jax.export.export(jax.jit(run))(x, jnp.ones((3, 3, 3, 5)))
    x, w = jnp.linspace(-1, 1, 2 * 48).reshape(2, 4, 4, 3), jnp.ones((3, 3, 3, 5))
    assert_equal(saved.call(x, w), run(x, w))


@each_case
def test_eager_and_compiled_calls_are_equal(operation, implementation):
    run = functools.partial(OPERATIONS[operation], implementation=implementation)
    of = operands(operation)
    eager = run(*of)
    assert_agree(jax.jit(run)(*of), eager)
    assert_agree(eager, OPERATIONS[operation](*of, implementation="xla"))


@each_case
def test_vmap(operation, implementation):
    """Everything mapped outside, and inside the first operand alone, along its last axis."""
    run = functools.partial(OPERATIONS[operation], implementation=implementation)
    draws = [[operands(operation, 2 * i + j) for j in range(2)] for i in range(2)]
    first = [[draw[0] for draw in row] for row in draws]
    rest = [row[0][1:] for row in draws]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[_stack_last(row) for row in first])
    others = jax.tree.map(lambda *a: jnp.stack(a), *rest)
    inner = jax.vmap(run, in_axes=(-1, *[None] * len(others)))
    got = jax.jit(jax.vmap(inner))(stacked, *others)
    for i in range(2):
        for j in range(2):
            expected = run(first[i][j], *rest[i])
            assert_agree(jax.tree.map(lambda a: a[i, j], got), expected)  # noqa: B023


def _stack_last(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a, -1), *trees)


def test_vmap_without_anything_mapped_is_no_batch():
    run = functools.partial(OPERATIONS["moments"], implementation="xla")
    of = operands("moments")
    out = jax.vmap(lambda _: run(*of), out_axes=None)(jnp.arange(3))
    assert_equal(out, run(*of))


def mesh(n: int = 2) -> jax.sharding.Mesh:
    return jax.make_mesh((n,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


@each_case
def test_shards(operation, implementation):
    """The first operand is another on each device, the others are the same."""
    run = functools.partial(OPERATIONS[operation], implementation=implementation)
    (first, *rest), (second, *_) = (operands(operation, seed) for seed in range(2))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), first, second)

    def on_each(mine: Any, *rest: Any) -> Any:
        out = run(jax.tree.map(lambda a: a[0], mine), *rest)
        assert all(varying_axes(leaf) == {"d"} for leaf in jax.tree.leaves(out))
        return jax.tree.map(lambda a: a[None], out)

    specs = (P("d"), *[P()] * len(rest))
    sharded = jax.shard_map(on_each, mesh=mesh(), in_specs=specs, out_specs=P("d"))
    got = jax.jit(sharded)(stacked, *rest)
    for i, mine in enumerate((first, second)):
        assert_agree(jax.tree.map(lambda a: a[i], got), run(mine, *rest))  # noqa: B023


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("implementation", implementations("moments"))
def test_replicated_operands_make_replicated_results(check, jit, implementation):
    run = functools.partial(OPERATIONS["moments"], implementation=implementation)
    of = operands("moments")
    sharded = jax.shard_map(run, mesh=mesh(), in_specs=P(), out_specs=P(), check_vma=check)
    assert_agree((jax.jit(sharded) if jit else sharded)(*of), run(*of))


def test_some_axes_of_a_mesh_are_left_to_xla():
    auto = (jax.sharding.AxisType.Auto,) * 2
    two = jax.make_mesh((2, 2), ("d", "m"), axis_types=auto)
    run, (a, *rest) = OPERATIONS["activate"], operands("activate")
    a = jnp.concatenate([a, a])
    line, offsets, added = rest[0], jnp.tile(rest[1], 2), jnp.tile(rest[2], (2, 1, 1, 1))
    specs = (P("d"), P(), P("d"), P("d"))
    sharded = jax.shard_map(run, mesh=two, in_specs=specs, out_specs=P("d"), axis_names={"d"})
    assert_agree(jax.jit(sharded)(a, line, offsets, added), run(a, line, offsets, added))


@needs_native
def test_sharded_operands_without_shard_map_give_the_same():
    of = operands("activate")
    rows = jax.sharding.NamedSharding(mesh(3), P("d"))
    sharded = jax.device_put(of[0], rows), of[1], *jax.device_put(of[2:], rows)
    for implementation in ("native", "xla"):
        run = functools.partial(OPERATIONS["activate"], implementation=implementation)
        assert_agree(jax.jit(run)(*sharded), run(*of))


def test_calls_run_where_their_operands_are():
    run, of = OPERATIONS["forward"], operands("forward")
    second = jax.devices()[1]
    assert run(*jax.device_put(of, second)).devices() == {second}
    with jax.default_device(second):
        assert run(*operands("forward")).devices() == {second}


@each_case
def test_operands_of_numpy(operation, implementation):
    run = functools.partial(OPERATIONS[operation], implementation=implementation)
    of = operands(operation)
    assert_agree(run(*jax.tree.map(np.asarray, of)), run(*of))


def test_doubles_of_numpy_are_single_as_everywhere_in_jax():
    g, m, v, factors = operands("adam")
    doubles = (np.asarray(a, np.float64) for a in (g, m, v))
    assert_agree(kernels.adam(*doubles, factors), kernels.adam(g, m, v, factors))


# What looks into a program, or transforms it


@pytest.mark.parametrize("implementation", implementations("moments"))
def test_without_jit(implementation):
    run = functools.partial(OPERATIONS["moments"], implementation=implementation)
    of = operands("moments")
    expected = run(*of)
    with jax.disable_jit():
        assert_agree(run(*of), expected)
        assert_agree(jax.jit(run)(*of), expected)


@pytest.mark.parametrize("implementation", implementations("moments"))
def test_nans_are_found_and_nothing_else(implementation):
    run = functools.partial(OPERATIONS["encode_weights"], implementation=implementation)
    (w,) = operands("encode_weights")
    poisoned = w.at[0, 0, 0, 0].set(jnp.nan)
    with jax.debug_nans(True):
        assert_agree(run(w), run(w))
        assert_agree(jax.jit(run)(w), run(w))
        for call in (run, jax.jit(run)):
            with pytest.raises(FloatingPointError, match="nan"):
                call(poisoned)


def test_kernels_say_that_they_have_no_derivative():
    x, w = operands("float_conv")
    with pytest.raises(NotImplementedError, match="the kernel float_conv has no derivative of its"):
        jax.grad(lambda x: OPERATIONS["float_conv"](x, w).sum())(x)
    # What is not differentiated may stand in a function that is.
    run = OPERATIONS["float_conv"]
    assert_equal(
        jax.grad(lambda a: a * run(jax.lax.stop_gradient(x), w).sum())(1.0), run(x, w).sum()
    )


def chain(implementation: str | None) -> nnx.Module:
    rngs = nnx.Rngs(0)
    to = {"implementation": implementation, "rngs": rngs}
    return fqt.Sequential(
        fqt.QuantConv(3, 8, 3, **to),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.PReLU(),
        functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
        fqt.QuantConv(8, 8, 3, **to),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.PReLU(),
    )


def chain_gradient(implementation: str | None) -> tuple[Any, tuple[Any, ...]]:
    """The gradient of a fused chain's loss, as a function of arrays alone, and these."""
    graphdef, params, rest = nnx.split(chain(implementation), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
    leaves, tree = jax.tree.flatten((params, rest, x))

    def gradient(*leaves: jax.Array) -> list[jax.Array]:
        params, rest, x = jax.tree.unflatten(tree, leaves)

        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params, rest, copy=True)(x)))

        return jax.tree.leaves(jax.grad(loss)(params))

    return gradient, tuple(leaves)


@pytest.mark.usefixtures("relaxed_promotion")
def test_a_chains_gradient_is_fused_and_lowers_for_every_platform():
    assert all(layer.run == 1 for layer in chain(None).explain())
    gradient, leaves = chain_gradient(None)
    module = exported(gradient, *leaves, platforms=("cuda", "rocm", "tpu"))
    assert "@fqt_jax_" not in module
    here = jax.jit(gradient).lower(*leaves).as_text()
    if native.unavailable() is None:
        for operation in ("encode", "forward", "weight_grad", "gradient_sums", "gradient"):
            assert f"@fqt_jax_{operation}(" in here
        explicit, leaves = chain_gradient("native")
        with pytest.raises(UnsupportedError, match="is lowered for tpu; native serves cpu only"):
            exported(explicit, *leaves, platforms=TPU)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_rematerialization_changes_nothing(implementation):
    x, w = jax.random.normal(jax.random.key(0), (4, 5, 5, 3)), jnp.linspace(-2, 2, 135)
    to = {"recipe": fqt.QAT, "implementation": implementation}

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(fqt.conv(x, w.reshape(3, 3, 3, 5), **to)))

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    again = jax.grad(jax.checkpoint(loss), (0, 1))
    assert_agree(jax.jit(again)(x, w), expected)


# Memory


@needs_native
@pytest.mark.parametrize(
    ("operation", "shapes", "donated"),
    [
        ("adam", [(512, 1024)] * 3 + [(7,)], (0, 1, 2)),
        ("finish_weight_grad", [(3, 3, 256, 256)] * 2 + [(256,)], (0,)),
    ],
)
def test_what_may_be_overwritten_is(operation, shapes, donated):
    """Of a result that is made here, and of operands that are given away, nothing is copied."""
    of = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    size = 4 * of[0].size
    run = functools.partial(OPERATIONS[operation], implementation="native")

    def after_something(first: jax.Array, *rest: jax.Array) -> Any:
        return run(first * 2, *rest)

    for function in (run, after_something):
        program = jax.jit(function, donate_argnums=donated).lower(*of).compile()
        _, entry = program.as_text().split("ENTRY ")
        (call,) = [line for line in entry.splitlines() if f'"fqt_jax_{operation}"' in line]
        (aliases,) = re.findall(r"output_to_operand_aliasing=\{(.*?\))\}", call)
        assert aliases.count("(") == len(donated)
        assert " copy(" not in entry
        assert program.memory_analysis().temp_size_in_bytes < size / 8


@needs_native
@pytest.mark.parametrize("operation", ["adam", "finish_weight_grad"])
def test_what_is_not_given_away_survives(operation):
    run, of = functools.partial(OPERATIONS[operation], implementation="native"), operands(operation)
    before = jax.tree.map(np.array, of)
    for call in (run, jax.jit(run)):
        call(*of)
        assert_equal(of, before)

"""Spoils valid calls of the native kernels: each must return or raise, and never end the process.

  python -m tests.kernels.native.fuzz [FIRST [CASES]]

Case i is the same in every run: a crash at case i is seen again with FIRST i and CASES 1. Each
number is written to the standard error before its case runs.
"""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fqt_jax  # noqa: F401, registers the kernels
from tests.kernels.native import calls
from tests.kernels.native.calls import Call, Geometry, Random

LARGE = [2**15, 2**16, 2**24, 2**30, 2**31 - 1]
NUMBERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 8, 9, 31, 2**31, 2**32, 2**48, 2**62, 2**63 - 1]
SIZES = [0, 1, 2, 3, 7, 8, 33]
GROUPS = [*SIZES, *SIZES, 2**13]  # samples or channels, which other operands have entries for
TYPES = [np.float32, np.int32, np.uint32, np.int16, np.int8, np.uint8, np.float16, np.bool_]
FLOATS = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-42, 1e-30, 1, -1, 1e30, 3e38], np.float32)
MOST_ENTRIES = 2**18  # of an array
MOST_PRODUCTS = 2**28  # of an attention, which would run for minutes
# The product of an empty array's other axes: XLA itself takes minutes to compile larger ones.
MOST_EMPTY = 2**24


def pick(rng: Random, values: Any) -> Any:
    return values[int(rng.integers(0, len(values)))]


def fits(shape: calls.Shape) -> bool:
    return math.prod(shape) <= MOST_ENTRIES and math.prod(max(1, n) for n in shape) <= MOST_EMPTY


def other_shape(rng: Random, shape: calls.Shape) -> calls.Shape:
    """A shape like this one, with an axis more, less, or of another length."""
    axes = list(shape)
    what = int(rng.integers(0, 5)) if axes else 0
    axis = int(rng.integers(0, len(axes))) if axes else 0
    if what == 0:
        axes.insert(axis, pick(rng, SIZES))
    elif what == 1:
        del axes[axis]
    elif what == 2:
        axes[axis] = max(0, axes[axis] + pick(rng, [-1, 1]))
    elif what == 3:
        axes[axis] = pick(rng, SIZES + LARGE)
    else:
        axes = [] if rng.integers(0, 2) else axes[::-1]
    while not fits(tuple(axes)):
        axes[int(np.argmax(axes))] = pick(rng, SIZES)
    return tuple(axes)


def random_values(rng: Random, shape: calls.Shape, dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return rng.choice(FLOATS, shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(dtype)
    return rng.choice([limits.min, 0, 1, 2, 5, limits.max], shape).astype(dtype)


def spoil_shape(rng: Random, call: Call) -> None:
    i = int(rng.integers(0, len(call.operands)))
    old = call.operands[i]
    call.operands[i] = random_values(rng, other_shape(rng, old.shape), old.dtype)


def spoil_alike(rng: Random, call: Call) -> None:
    """All operands and results of one shape take another one together."""
    old = pick(rng, call.operands).shape
    new = other_shape(rng, old)
    for i, operand in enumerate(call.operands):
        if operand.shape == old:
            call.operands[i] = random_values(rng, new, operand.dtype)
    call.results = [(new if shape == old else shape, dtype) for shape, dtype in call.results]


def spoil_type(rng: Random, call: Call) -> None:
    i = int(rng.integers(0, len(call.operands)))
    call.operands[i] = random_values(rng, call.operands[i].shape, pick(rng, TYPES))


def spoil_values(rng: Random, call: Call) -> None:
    """Any values, or indices that repeat, decrease or lie outside."""
    i = int(rng.integers(0, len(call.operands)))
    old = call.operands[i]
    if old.dtype == np.int32 and old.ndim == 1 and old.size and rng.integers(0, 2):
        new = old.copy()
        values = [*map(int, old), -1, old.size, 2**31 - 1, -(2**31)]
        new[int(rng.integers(0, old.size))] = pick(rng, values)
        call.operands[i] = new
    else:
        call.operands[i] = random_values(rng, old.shape, old.dtype)


def spoil_results(rng: Random, call: Call) -> None:
    i = int(rng.integers(0, len(call.results)))
    shape, dtype = call.results[i]
    what = int(rng.integers(0, 4))
    if what == 0:
        call.results[i] = shape, pick(rng, TYPES)
    elif what == 1:
        call.results.insert(i, (other_shape(rng, shape), dtype))
    elif what == 2 and len(call.results) > 1:
        del call.results[i]
    else:
        call.results[i] = other_shape(rng, shape), dtype
    call.in_place = {}


def spoil_operand_list(rng: Random, call: Call) -> None:
    """One operand too many, too few, twice, or in another's place."""
    i, j = (int(v) for v in rng.integers(0, len(call.operands), 2))
    what = int(rng.integers(0, 4))
    if what == 0:
        call.operands.insert(i, call.operands[j])
        call.in_place = {}
    elif what == 1 and len(call.operands) > 1:
        del call.operands[i]
        call.in_place = {}
    elif what == 2:
        call.operands[i] = call.operands[j]
    else:
        call.operands[i], call.operands[j] = call.operands[j], call.operands[i]


def spoil_attributes(rng: Random, call: Call) -> None:
    names = list(call.attributes)
    what = int(rng.integers(0, 8))
    if what == 0 or not names:
        call.attributes["unknown"] = np.int64(3)
        return
    name = pick(rng, names)
    value = call.attributes[name]
    if what == 1:
        del call.attributes[name]
    elif what == 2:
        call.attributes[name] = pick(rng, [True, np.int32(1), np.float32(1), "text", value])
    elif isinstance(value, np.ndarray):
        value = value.copy()
        if what == 3:
            value = value[: int(rng.integers(0, len(value)))]
        elif what == 4:
            value = value.astype(np.int32)
        else:
            value[int(rng.integers(0, len(value)))] = pick(rng, NUMBERS)
        call.attributes[name] = value
    elif isinstance(value, bool):
        call.attributes[name] = not value
    else:
        call.attributes[name] = np.int64(pick(rng, NUMBERS))


def spoil_aliases(rng: Random, call: Call) -> None:
    """Results elsewhere than a kernel that works in place takes them to be."""
    call.in_place = {}


SPOIL: list[Callable[[Random, Call], None]] = [
    spoil_shape,
    spoil_shape,
    spoil_alike,
    spoil_alike,
    spoil_type,
    spoil_values,
    spoil_values,
    spoil_results,
    spoil_operand_list,
    spoil_attributes,
    spoil_attributes,
    spoil_aliases,
]


def wild_geometry(rng: Random) -> Geometry:
    """Sizes that fit together and are out of the ordinary: empty, huge, all padding."""

    def number(least: int = 0) -> int:
        return max(least, pick(rng, LARGE if rng.integers(0, 5) == 0 else SIZES))

    while True:
        geometry = Geometry(
            n=pick(rng, GROUPS),
            c=pick(rng, GROUPS),
            o=pick(rng, GROUPS),
            size=(number(), number()),
            window=(number(1), number(1)),
            strides=(number(1), number(1)),
            padding=(number(), number(), number(), number()),
        )
        if min(geometry.out) < 1:
            continue
        if all(map(fits, (geometry.x, geometry.w, geometry.y))):
            return geometry


def wild_shape(rng: Random, axes: int) -> calls.Shape:
    while True:
        shape = tuple(pick(rng, SIZES + LARGE) for _ in range(axes - 1))
        shape = (pick(rng, GROUPS), *shape[1:], pick(rng, GROUPS))[-axes:]
        if fits(shape):
            return shape


def wild(rng: Random, kernel: str) -> Call:
    """A call whose operands fit together; whether the kernel serves it is up to the kernel."""
    if kernel in calls.CONVOLUTIONS:
        return calls.CONVOLUTIONS[kernel](rng, wild_geometry(rng))
    if kernel in calls.TRANSFORMS:
        return calls.TRANSFORMS[kernel](rng, wild_shape(rng, 4))
    if kernel in calls.ATTENTION:
        n, length, heads, d = wild_shape(rng, 4)
        while length**2 * n * heads * d > MOST_PRODUCTS:
            length //= 2
        return calls.ATTENTION[kernel](rng, (n, length, 3, heads, d))
    if kernel in calls.DRAWS:
        return calls.DRAWS[kernel](rng, pick(rng, GROUPS))
    return calls.WEIGHTS[kernel](rng, wild_shape(rng, int(rng.integers(1, 5))))


def make(case: int) -> Call:
    rng = np.random.default_rng(case)
    kernel = calls.KERNELS[case % len(calls.KERNELS)]
    if rng.integers(0, 3) == 0:
        call = wild(rng, kernel)
        spoilt = int(rng.integers(0, 2))
    else:
        call = calls.ordinary(rng, kernel)
        spoilt = int(rng.integers(1, 4))
    for _ in range(spoilt):
        pick(rng, SPOIL)(rng, call)
    return call


def main(first: int, cases: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    for case in range(first, first + cases):
        call = make(case)
        print(f"\r{case} {call.kernel}   ", end="", file=sys.stderr, flush=True)
        try:
            call.run()
            outcomes["returned"] += 1
        except Exception as error:
            outcomes["refused" if "fqt_jax" in str(error) else "refused by XLA"] += 1
        if case % 512 == 511:
            jax.clear_caches()
    print("\n" + ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())))


if __name__ == "__main__":
    main(*map(int, [*sys.argv[1:], *["0", "1000"][len(sys.argv) - 1 :]]))

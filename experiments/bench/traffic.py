"""What devices send to each other in a step, read from the compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_LINE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\((.*)")
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: such as ``all-reduce``.
      type: of the entries, such as ``f32``; of the first array where there are several.
      entries: in all arrays of its result.
      bytes: of its result.
      branch: of the conditional it is in, or ``None``.
    """

    kind: str
    type: str
    entries: int
    bytes: int
    branch: int | None

    def sent(self, devices: int) -> float:
        """Bytes that each of so many devices sends, by the usual algorithms of rings."""
        share = (devices - 1) / devices
        if self.kind == "all-reduce":  # a reduce-scatter, and an all-gather
            return 2 * share * self.bytes
        if self.kind == "reduce-scatter":  # the result is one device's part
            return (devices - 1) * float(self.bytes)
        return share * self.bytes


def collectives(text: str) -> list[Collective]:
    """The collective operations of a compiled program.

    Args:
      text: the program, as ``compiled.as_text()`` has it.

    Example:
      >>> line = '%a = (f32[3,3]{1,0}, f32[]) all-reduce(%b, %c), metadata={op_name="jit(f)/psum"}'
      >>> collectives(line)
      [Collective(kind='all-reduce', type='f32', entries=10, bytes=40, branch=None)]
      >>> collectives(line)[0].sent(2)
      40.0
    """
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        arrays = [
            (kind, math.prod(int(n) for n in shape.split(",") if n))
            for kind, shape in _ARRAY.findall(match[1])
        ]
        branch = re.search(r'op_name="[^"]*/branch_(\d+)_fun', match[3])
        found.append(
            Collective(
                match[2],
                arrays[0][0],
                sum(entries for _, entries in arrays),
                sum(_BYTES[kind] * entries for kind, entries in arrays),
                int(branch[1]) if branch else None,
            )
        )
    return found

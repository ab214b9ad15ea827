"""Counts what a compiled program does from XLA's text of it: floating-point operations and bytes of collectives.

Notable: XLA's own cost analysis counts the body of a loop once. Here a loop's body counts as often as its condition
says; a loop whose end is only known when it runs is listed apart, with the cost of one turn. Matrix products and
convolutions are counted (a TPU writes products as convolutions), two operations a multiply-add; what is element by
element is not. A kernel that XLA does not see into is counted as its name says, by a function of its caller.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = type opcode(arguments…`; `rest` is everything after the opening parenthesis."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        return []

    def called(self, key: str) -> list[str]:
        """Names of the computations that an attribute names, e.g. "body"."""
        return [
            name.strip().removeprefix("%")
            for match in _CALLED.finditer(self.rest)
            if match.group(0).startswith(key + "=")
            for name in match.group(1).split(",")
        ]


@dataclasses.dataclass
class Cost:
    """What a device does.

    Attributes:
      flops: of products and convolutions, loops of known length multiplied out.
      collective_bytes: by kind, the bytes of the larger of what goes in and what comes out.
      dynamic_loops: the cost of one turn of each loop whose length is not known before it runs.
    """

    flops: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    dynamic_loops: list[Cost] = dataclasses.field(default_factory=list)

    def add(self, other: Cost, times: float = 1) -> None:
        """Adds `times` times another cost."""
        self.flops += times * other.flops
        for kind, size in other.collective_bytes.items():
            self.collective_bytes[kind] += times * size
        self.dynamic_loops += other.dynamic_loops * max(1, round(times))


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of each array in a type."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _SHAPE.findall(text)]


def size_of(text: str) -> int:
    """Bytes of all arrays in a type; an unlisted element type has 4."""
    return sum(_BYTES.get(kind, 4) * math.prod(dims) for kind, dims in shapes(text))


class Program:
    """The text of a compiled module, e.g. `jax.stages.Compiled.as_text()`.

    Args:
      text: of the module.
      kernel_flops: operations of a custom call, from its name and the shapes of its operands; 0 for those that compute
        nothing. None counts no custom call.
    """

    def __init__(self, text: str, kernel_flops: Callable[[str, list[tuple[int, ...]]], float] | None = None):
        self._kernel_flops = kernel_flops
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head.group(2), [])
                self.entry = head.group(2) if head.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))
        self._costs: dict[str, Cost] = {}
        self._channels: set[str] = set()

    def cost(self) -> Cost:
        """Of one run of the program, on one device."""
        return self._cost(self.entry)

    def _cost(self, name: str) -> Cost:
        if name not in self._costs:
            total = Cost()
            types = {instruction.name: instruction.type for instruction in self.computations.get(name, [])}
            for instruction in self.computations.get(name, []):
                self._add(total, instruction, types, name)
            self._costs[name] = total
        return self._costs[name]

    def _add(self, total: Cost, instruction: Instruction, types: dict[str, str], computation: str) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            # What runs beside other work is written as several copies of one collective, each with its channel. A loop
            # may have one more before it, for its first turn: that is another transfer, so channels are a loop's own.
            if channel is None or channel.group(1) not in self._channels:
                own = size_of(instruction.type)
                given = sum(size_of(types.get(operand, "")) for operand in instruction.operands)
                total.collective_bytes[kind] += max(own if kind == instruction.opcode else own - given, given)
                if channel is not None:
                    self._channels.add(channel.group(1))
        elif kind == "while":
            outside, self._channels = self._channels, set()
            body = self._cost(instruction.called("body")[0])
            self._channels = outside
            turns = self._turns(instruction, computation)
            if turns is None:
                total.dynamic_loops.append(body)
            else:
                total.add(body, turns)
        elif kind == "conditional":
            branches = [self._cost(branch) for branch in instruction.called("branch_computations")]
            total.add(max(branches, key=lambda cost: cost.flops))
        elif kind == "dot":
            total.flops += _dot_flops(instruction, types)
        elif kind == "convolution":
            total.flops += _convolution_flops(instruction, types)
        elif kind == "custom-call":
            if self._kernel_flops is not None:
                operands = [shapes(types[operand]) for operand in instruction.operands if operand in types]
                total.flops += self._kernel_flops(instruction.name, [found[0][1] for found in operands if found])
        else:
            for called in instruction.called("calls"):
                total.add(self._cost(called))

    def _turns(self, loop: Instruction, computation: str) -> int | None:
        """How often a loop runs, where it counts from a constant up to a constant."""
        condition = self.computations[loop.called("condition")[0]]
        pool = list(condition)
        for instruction in condition:
            for called in instruction.called("calls"):
                pool += self.computations[called]
        limits = [c for c in pool if c.opcode == "constant" and c.type.startswith(("s32[]", "u32[]", "s64[]"))]
        compares = [c for c in pool if c.opcode == "compare"]
        if len(limits) != 1 or len(compares) != 1 or "direction=LT" not in compares[0].rest:
            return None
        index = next((int(i) for c in condition for i in re.findall(r"index=(\d+)", c.rest)), None)
        length = int(limits[0].rest.split(")")[0]) - self._first(loop, index, computation)
        return -(-length // self._stride(loop, index))

    def _first(self, loop: Instruction, index: int | None, computation: str) -> int:
        """The first value of the loop's counter, element `index` of what it carries: 0, unless it starts elsewhere."""
        own = {instruction.name: instruction for instruction in self.computations[computation]}
        start = own.get(loop.operands[0]) if loop.operands else None
        if index is None or start is None or start.opcode != "tuple":
            return 0
        counter = _behind(own, start.operands[index])
        return _constant(counter) if counter is not None and counter.opcode == "constant" else 0

    def _stride(self, loop: Instruction, index: int | None) -> int:
        """What a turn adds to the counter: 1, unless the body stands for several turns of the loop as written."""
        body = self.computations[loop.called("body")[0]]
        own = {instruction.name: instruction for instruction in body}
        if index is None or not body or body[-1].opcode != "tuple":
            return 1
        step = _behind(own, body[-1].operands[index])
        if step is not None and step.opcode == "fusion":
            own |= {instruction.name: instruction for instruction in self.computations[step.called("calls")[0]]}
            step = self.computations[step.called("calls")[0]][-1]
        if step is None or step.opcode != "add":
            return 1
        parts = [_behind(own, operand) for operand in step.operands]
        return next((_constant(part) for part in parts if part is not None and part.opcode == "constant"), 1)


def _behind(own: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction of a computation that makes a value, behind copies of it."""
    found = own.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
        found = own.get(found.operands[0])
    return found


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.split(")")[0])


def _dot_flops(instruction: Instruction, types: dict[str, str]) -> float:
    left = shapes(types[instruction.operands[0]])[0][1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    inner = math.prod(left[int(d)] for d in contracted.group(1).split(",") if d) if contracted else 1
    return 2.0 * math.prod(shapes(instruction.type)[0][1]) * inner


def _convolution_flops(instruction: Instruction, types: dict[str, str]) -> float:
    """Two for each pair of an input and a kernel place that meet, padding and holes left out."""
    labels = _LABELS.search(instruction.rest)
    assert labels is not None, instruction
    sides = [shapes(types[operand])[0][1] for operand in instruction.operands[:2]] + [shapes(instruction.type)[0][1]]
    place = [dict(zip(text, dims, strict=True)) for text, dims in zip(labels.groups(), sides, strict=True)]
    window = _WINDOW.search(instruction.rest)
    settings = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in place[0] if label.isdigit())

    def numbers(key: str, default: str) -> list[str]:
        return settings.get(key, "x".join([default] * len(spatial))).split("x") if spatial else []

    pairs = 1
    columns = zip(
        spatial, numbers("stride", "1"), numbers("pad", "0_0"), numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1"),
        strict=True,
    )  # fmt: skip
    for label, stride, pad, base, hole in columns:
        taken = range(place[2][label]), range(place[1][label])
        low, size = int(pad.split("_")[0]), (place[0][label] - 1) * int(base) + 1
        pairs *= sum(
            0 <= (at := out * int(stride) + k * int(hole) - low) < size and at % int(base) == 0
            for out in taken[0]
            for k in taken[1]
        )
    groups = int(_group(instruction, "batch_group_count"))
    return 2.0 * place[2]["b"] * place[2]["f"] * place[1]["i"] * pairs / groups


def _group(instruction: Instruction, key: str) -> str:
    found = re.search(rf"{key}=(\d+)", instruction.rest)
    return found.group(1) if found else "1"

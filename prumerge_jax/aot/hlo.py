"""What a compiled program does on one chip, read off its HLO text.

XLA's `cost_analysis` counts the body of a loop once, whatever its trip count; here every
computation counts as often as it runs.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]?f\d+\w*|[su]\d+|c\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'\bop_name="([^"]*)"')
_NAMED = re.compile(r"\b(adapter|attention|embedding|head|norm|rotary)\b")
_MOVES_HEADS = re.compile(r"\bheads/(shard_map/)?pallas_call$")
_PRODUCTS = ("convolution", "dot")
_MOVES = ("copy", "transpose", "bitcast", "slice", "dynamic-slice", "dynamic-update-slice", "pad")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


_BETWEEN_SLICES = '"xla_megascale_runtime"'
_EDGE = re.compile(
    r"^(?:async-collective|call|all-[a-z]+|collective-[a-z]+|reduce-scatter)-(start|done)\b"
)
_CODES = ("s8", "u8", "s4", "u4")
_CONTROL = ("while", "conditional", "call")
_FUSIONS = ("fusion", "async-start")

Array = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


class Traffic(NamedTuple):
    """Collectives of one kind: executions per run, and bytes that a chip receives at most."""

    executions: int
    bytes: int


class Wait(NamedTuple):
    """A collective, and what the schedule does in the meantime.

    Attributes:
      executions: per run.
      bytes: that a chip receives at most, each time.
      cycles: XLA's estimate of what stands between its start and its end, each time; 0 where it is
        not asynchronous. Kernels, and loops inside of it, count as nothing.
    """

    executions: int
    bytes: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """One run of a program on one chip.

    Attributes:
      collectives: by kind (`all-gather`, ...).
      cycles: XLA's estimate for everything but kernels and waiting for collectives; 0 where the
        backend makes none (only TPU's does).
      open_loops: loops whose trip count is not a constant; what they hold counts as often as the
        caller says.
      parts: `cycles` by what they are spent on: a scope of the models (`adapter`, `norm`, ...) or
        else `products`, `copies`, `collectives` and `elementwise`, by descending cycles. A fusion
        belongs where its last product does, else where its result does.
      between_slices: what leaves a slice, which the TPU's runtime sends over the network of the
        data centre; bytes that a chip sends. XLA makes of a collective between slices one within
        each, which is among `collectives`, and this.
      waits: the collectives one by one.
      moved: bytes that the kernels of `models/heads.py` read and write, for which XLA estimates no
        cycles.
    """

    collectives: Mapping[str, Traffic]
    cycles: int
    open_loops: int
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    between_slices: Traffic = Traffic(0, 0)
    waits: Sequence[Wait] = ()
    moved: int = 0


def program_cost(text: str, open_trips: int = 1) -> ProgramCost:
    """Reads the text of an optimised module (`compiled.as_text()`).

    Args:
      text: the module.
      open_trips: how often outermost loops run whose trip count is not a constant; such loops
        inside of others run once.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = _parse(text)
    found: dict[tuple[str, str, int], tuple[str, int, int]] = {}
    stored = set(_unfused(module))
    sends = sent = moved = 0
    waits: list[Wait] = []
    parts: Counter[str] = Counter()
    open_loops = 0
    for computation, runs in _executions(module, open_trips):
        if computation in stored:
            waits += [Wait(runs, *each) for each in _waits(module, computation)]
        for instruction in module.computations[computation]:
            if instruction.opcode == "custom-call" and _MOVES_HEADS.search(instruction.scope):
                moved += runs * _read_and_written(instruction, module.computations[computation])
            if instruction.cycles:
                parts[_part(module, instruction)] += runs * instruction.cycles
            open_loops += instruction.opcode == "while" and not _trips(module, instruction)
            if instruction.opcode == "send" and instruction.leaves_slice:
                sends += runs
                # A buffer, a context and a token; the first alone travels.
                sent += runs * _bytes(instruction.shape.partition("{")[0])
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            received = _received(instruction, module.computations[computation])
            # An asynchronous collective appears in its start, in what it overlaps with and in its
            # end, each time with the same channel.
            place = instruction.channel or f"{computation}.{instruction.name}"
            found[place, kind, received] = kind, runs, received
    totals = {
        kind: Traffic(
            sum(runs for k, runs, _ in found.values() if k == kind),
            sum(runs * size for k, runs, size in found.values() if k == kind),
        )
        for kind in sorted({kind for kind, _, _ in found.values()})
    }
    shares = dict(parts.most_common())
    between = Traffic(sends, sent)
    return ProgramCost(totals, parts.total(), open_loops, shares, between, tuple(waits), moved)


def expanded_codes(text: str) -> set[Array]:
    """Arrays that a module's program makes of integers of 8 or fewer bits, and that are no products
    with them.

    What exists only within a fusion has no place in memory and is not among them; what a fusion
    gives out is, beside a product too.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = _parse(text)
    found: set[Array] = set()
    for computation in _unfused(module):
        instructions = module.computations[computation]
        shapes = {each.name: each.shape for each in instructions}
        for instruction in instructions:
            if _passes_on(instruction):
                continue
            operands = (_arrays(shapes.get(name, "")) for name in instruction.operands)
            are_codes = [any(dtype in _CODES for dtype, _ in arrays) for arrays in operands]
            outputs = _arrays(instruction.shape)
            made = _made_of_codes(module, instruction, are_codes)
            found.update(array for array, is_made in zip(outputs, made, strict=True) if is_made)
    return found


def _unfused(module: "_Module") -> Iterator[str]:
    """The computations whose instructions are stored: all that are reached but by fusions."""
    pending, seen = [module.entry], set[str]()
    while pending:
        computation = pending.pop()
        if computation in seen:
            continue
        seen.add(computation)
        yield computation
        for instruction in module.computations[computation]:
            if instruction.opcode in _CONTROL:
                pending += instruction.called


def _passes_on(instruction: "_Instruction") -> bool:
    """Whether it only hands tuples on, or to other computations."""
    return instruction.opcode in (*_CONTROL, "tuple", "get-tuple-element")


def _made_of_codes(
    module: "_Module", instruction: "_Instruction", operands: Sequence[bool]
) -> list[bool]:
    """Of every array that an instruction gives out, whether it is made of codes other than by a
    product of matrices, or by a kernel, which may hold one.

    Args:
      module: where it is.
      instruction: no parameter.
      operands: of each of its operands, whether it is codes or made of them.
    """
    outputs = len(_arrays(instruction.shape))
    if instruction.opcode in (*_PRODUCTS, "custom-call"):
        return [False] * outputs
    fused = module.computations.get(instruction.called[0], []) if instruction.called else []
    if fused and instruction.opcode in _FUSIONS:
        made = _outputs_made_of_codes(module, fused, operands)
        if len(made) == outputs:
            return made
        return [any(made)] * outputs  # the operands are among them
    return [any(operands)] * outputs


def _outputs_made_of_codes(
    module: "_Module", fused: Sequence["_Instruction"], parameters: Sequence[bool]
) -> list[bool]:
    """`_made_of_codes` of a fusion of these instructions, which stand in their order."""
    made: dict[str, list[bool]] = {}
    for each in fused:
        if each.opcode == "parameter":
            made[each.name] = [parameters[int(each.operands[0])]]
        elif each.opcode == "tuple":
            made[each.name] = [flag for name in each.operands for flag in made[name]]
        else:
            operands = [any(made.get(name, ())) for name in each.operands]
            made[each.name] = _made_of_codes(module, each, operands)
    return next((made[each.name] for each in fused if each.is_root), [])


def _arrays(shape: str) -> list[Array]:
    """Dtype and shape, without sides of 1, of an array or of the arrays of a tuple."""
    found = []
    for dtype, text in _ARRAY.findall(shape):
        sides = tuple(int(side) for side in text.split(",") if side)
        found.append((dtype, tuple(side for side in sides if side != 1)))
    return found


class _Instruction(NamedTuple):
    name: str
    is_root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    condition: str | None
    channel: str | None
    value: int | None
    cycles: int
    trips: int | None
    scope: str
    leaves_slice: bool


class _Module(NamedTuple):
    entry: str
    computations: dict[str, list[_Instruction]]


def _parse(text: str) -> _Module:
    entry: str | None = None
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            current = None
        elif (match := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(match[3])):
            current.append(_instruction(match[2], match[3], opcode, is_root=bool(match[1])))
    if entry is None:
        raise ValueError("no entry computation: this is not the text of an HLO module")
    return _Module(entry, computations)


def _instruction(name: str, text: str, opcode: re.Match[str], *, is_root: bool) -> _Instruction:
    attributes = text[opcode.end() :]
    operands, _, _ = attributes.partition(")")
    called = _CALLED.findall(attributes)
    if branches := _BRANCHES.search(attributes):
        called += [branch.strip(" %") for branch in branches[1].split(",")]
    condition = re.search(r"\bcondition=%?([\w.\-]+)", attributes)
    channel = re.search(r"\bchannel_id=(\d+)", attributes)
    cycles = _CYCLES.search(attributes)
    scope = _SCOPE.search(attributes)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes)
    return _Instruction(
        name=name,
        is_root=is_root,
        shape=text[: opcode.start()],
        opcode=opcode[1],
        operands=tuple(re.findall(r"%?([\w.\-]+)(?:,|$)", operands)),
        called=tuple(called),
        condition=condition[1] if condition else None,
        channel=channel[1] if channel else None,
        value=int(operands) if opcode[1] == "constant" and operands.isdigit() else None,
        cycles=int(cycles[1]) if cycles else 0,
        trips=int(trips[1]) if trips else None,
        scope=scope[1] if scope else "",
        leaves_slice=_BETWEEN_SLICES in attributes,
    )


def _part(module: _Module, instruction: _Instruction) -> str:
    """What the cycles of an instruction are spent on; see `ProgramCost.parts`."""
    inner = [instruction]
    for computation in instruction.called:
        inner += module.computations.get(computation, [])
    products = [each for each in inner if each.opcode in _PRODUCTS]
    if named := _NAMED.findall((products or [instruction])[-1].scope):
        return str(named[-1])
    if products:
        return "products"
    if any(each.opcode.removesuffix("-start") in _COLLECTIVES for each in inner):
        return "collectives"
    root = next((each for each in inner[1:] if each.is_root), instruction)
    return "copies" if root.opcode in _MOVES else "elementwise"


def _executions(module: _Module, open_trips: int) -> Iterator[tuple[str, int]]:
    """Every computation that the entry reaches, and how often it runs."""
    pending = [(module.entry, 1, False)]
    while pending:
        computation, runs, in_loop = pending.pop()
        yield computation, runs
        for instruction in module.computations[computation]:
            inner, is_loop = runs, instruction.opcode == "while"
            if is_loop:
                inner *= _trips(module, instruction) or (1 if in_loop else open_trips)
            pending += [(name, inner, in_loop or is_loop) for name in instruction.called]


def _trips(module: _Module, loop: _Instruction) -> int | None:
    """Trip count of a loop. Where XLA states none, the bound in the loop's condition: scans count
    from 0 in steps of 1."""
    if loop.trips is not None:
        return loop.trips
    instructions = module.computations.get(loop.condition or "", [])
    bounds = [i.value for i in instructions if i.value is not None]
    compares = any(i.is_root and i.opcode == "compare" for i in instructions)
    return bounds[0] if compares and len(bounds) == 1 else None


def _waits(module: _Module, computation: str) -> Iterator[tuple[int, int]]:
    """Bytes and cycles of all collectives that a computation executes; see `Wait`."""
    begun: dict[str | None, tuple[int, int]] = {}
    channels: dict[str, str] = {}
    cycles = 0
    for instruction in module.computations[computation]:
        edge = _EDGE.search(instruction.name) or _EDGE.search(instruction.opcode)
        collective, place = _collective_of(module, instruction, computation)
        if edge and edge[1] == "done":
            held = collective.channel if collective else None
            channel = held or channels.get((instruction.operands or ("",))[0], "")
            if channel in begun:
                received, before = begun.pop(channel)
                yield received, cycles - before
        elif collective and edge:
            channels[instruction.name] = channel = collective.channel or instruction.name
            begun[channel] = _received(collective, module.computations[place]), cycles
        elif collective and collective.channel not in begun:  # and not overlapped with either
            yield _received(collective, module.computations[place]), 0
        cycles += instruction.cycles


def _collective_of(
    module: _Module, instruction: _Instruction, computation: str
) -> tuple[_Instruction | None, str]:
    """The collective that an instruction is, or holds, and the computation where that stands."""
    if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
        return instruction, computation
    if instruction.opcode in (*_FUSIONS, "call-start"):
        for name in instruction.called:
            for each in module.computations[name]:
                if each.opcode in _COLLECTIVES:
                    return each, name
    return None, computation


def _read_and_written(instruction: _Instruction, computation: list[_Instruction]) -> int:
    """Bytes of operands and result."""
    return _operand_bytes(instruction, computation) + _bytes(instruction.shape)


def _operand_bytes(instruction: _Instruction, computation: list[_Instruction]) -> int:
    shapes = {other.name: other.shape for other in computation}
    return sum(_bytes(shapes.get(name, "")) for name in instruction.operands)


def _received(instruction: _Instruction, computation: list[_Instruction]) -> int:
    """The larger of operands and result; an all-reduce is a reduce-scatter and an all-gather."""
    operands, result = _operand_bytes(instruction, computation), _bytes(instruction.shape)
    if instruction.opcode.endswith("-start"):
        result -= operands  # its result holds the operands too
    size = max(operands, result)
    return 2 * size if instruction.opcode.startswith("all-reduce") else size


def _bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays."""
    total = 0.0
    for dtype, sides in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
        total += math.prod(int(side) for side in sides.split(",") if side) * bits / 8
    return int(total)

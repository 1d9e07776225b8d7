"""Programs compiled for a TPU slice that is not present: memory, collectives, estimated time.

Nothing runs. Times are XLA's cycle estimates, as far as it makes them, and peak rates for the
rest; they leave out waiting, launches and the host.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from prumerge_jax.aot.hlo import ProgramCost, expanded_codes, program_cost
from prumerge_jax.aot.topology import Topology
from prumerge_jax.cost import Chip, Tpu, counts
from prumerge_jax.models.attention import backend_for
from prumerge_jax.models.attention.splash import splash_pairs
from prumerge_jax.models.config import TextConfig, VisionConfig

Sizes = Mapping[str, int]
"""Number of devices along each axis of a mesh."""
CAVEAT = (
    "(compiled, not run: XLA's cycle estimates, kernels and links at their peaks, "
    "collectives overlapped)"
)
"""The last line of every plan."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as one chip runs it.

    Attributes:
      name: name of the function.
      arguments, outputs, temporaries: bytes; outputs without those that take a donated argument's
        place.
      cost: collectives and XLA's estimate.
      kernel_flops: FLOPs of hand-written kernels, for which XLA estimates nothing.
      compile_seconds: how long XLA took.
      kernel_bytes: bytes that those kernels read.
      steps: steps of one run; what is said of times and links is said of one step, to which a run's
        own work belongs in part.
    """

    name: str
    arguments: int
    outputs: int
    temporaries: int
    cost: ProgramCost
    kernel_flops: float
    compile_seconds: float
    kernel_bytes: float = 0.0
    steps: int = 1

    def compute_seconds(self, chip: Chip) -> float:
        """XLA's cycles, and kernels at the peak."""
        kernels = max(self.kernel_flops / chip.flops, self.kernel_bytes / chip.bandwidth)
        moves = self.cost.moved / self.steps / chip.bandwidth
        return self.cost.cycles / self.steps / tpu(chip).clock + kernels + moves

    def interconnect_seconds(self, chip: Chip) -> float:
        """What the collectives move, at the peak of all links of a chip."""
        received = sum(traffic.bytes for traffic in self.cost.collectives.values())
        return received / self.steps / tpu(chip).interconnect

    def seconds(self, chip: Chip) -> float:
        """One run, where all collectives overlap with computing."""
        return max(self.compute_seconds(chip), self.interconnect_seconds(chip))

    def waiting_seconds(self, chip: Chip) -> float:
        """What XLA's schedule leaves of the collectives' time to nothing else."""
        rate, clock = tpu(chip).interconnect, tpu(chip).clock
        waits = (w.executions * max(w.bytes / rate - w.cycles / clock, 0) for w in self.cost.waits)
        return sum(waits) / self.steps

    def scheduled_seconds(self, chip: Chip) -> float:
        """One run, where collectives overlap as far as XLA's schedule lets them."""
        return self.compute_seconds(chip) + self.waiting_seconds(chip)


class CopiesWeights(RuntimeError):
    """A program holds what was quantised in 16 or more bits."""


class DoesNotFit(RuntimeError):
    """XLA found no way to run a program in the memory of a chip."""


def tpu(chip: Chip) -> Tpu:
    """The TPU-specific figures of a chip.

    Raises:
      ValueError: it is not a TPU.
    """
    if chip.tpu is None:
        raise ValueError("plans are for TPUs; this chip is not one")
    return chip.tpu


def compile_program(
    name: str,
    lowered: jax.stages.Lowered,
    kernel_flops: float = 0.0,
    kernel_bytes: float = 0.0,
    quantised: Collection[tuple[int, int]] = (),
    steps: int = 1,
) -> Program:
    """Compiles one program, whose outermost loop runs `steps` times if nothing else says how often.

    Args:
      name: of the program.
      lowered: what to compile.
      kernel_flops, kernel_bytes: see `Program`.
      quantised: shapes, as a chip holds them, of kernels that must not exist in 16 or more bits.
      steps: see above.

    Raises:
      DoesNotFit: its arguments and temporaries exceed the memory of a chip.
      CopiesWeights: one of those kernels does.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        detail = f"needs {used[1]} of {used[2]}" if used else str(error).splitlines()[0]
        raise DoesNotFit(f"{name} {detail}") from error
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # every backend that plans are made for has both
    assert text is not None
    check_no_copies(name, text, quantised)
    return Program(
        name,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        cost=program_cost(text, steps),
        kernel_flops=kernel_flops,
        compile_seconds=seconds,
        kernel_bytes=kernel_bytes,
        steps=steps,
    )


def check_no_copies(name: str, text: str, quantised: Collection[tuple[int, int]]) -> None:
    """Raises CopiesWeights where a program, as HLO text, stores one of these kernels [d_in, d_out],
    either way round, in 16 or more bits.

    Only what is made of codes is looked at: activations, and weights that are not quantised, may
    have the same shape.
    """
    if not quantised:
        return
    kernels = {shape for d_in, d_out in quantised for shape in ((d_in, d_out), (d_out, d_in))}
    for dtype, shape in sorted(expanded_codes(text)):
        if dtype in ("bf16", "f16", "f32") and shape[-2:] in kernels:
            raise CopiesWeights(
                f"{name} holds {dtype}{list(shape)}: a copy of a quantised kernel, which would "
                "cost more than the quantised weights save"
            )


def tower_kernel_flops(vision: VisionConfig, images: int, dtype: jnp.dtype) -> float:
    """FLOPs of the TPU's attention kernel for a batch of images, padding included.

    0 where the tower gets another backend on the current mesh.
    """
    if backend_for(dtype, vision.head_dim) != "splash":
        return 0.0
    pairs = splash_pairs(vision.num_patches + 1, causal=False)
    return counts.tower_attention_flops(vision, images * pairs)


def decoder_kernel_flops(text: TextConfig, rows: int, pairs: float, dtype: jnp.dtype) -> float:
    """FLOPs of that kernel, forward, for rows of `pairs` (query, key) pairs each; 0 as above."""
    if backend_for(dtype, text.head_dim) != "splash":
        return 0.0
    return counts.attention_flops(text, rows * pairs)


def peak_bytes(resident: int, programs: Iterable[Program]) -> int:
    """Peak bytes per chip: what is resident, and the largest working set of a program."""
    return resident + max(p.temporaries + p.outputs for p in programs)


class Planned(Protocol):
    """What every plan provides."""

    @property
    def memory(self) -> int:
        """Peak bytes per chip."""


Plan = TypeVar("Plan", bound=Planned)


def first_that_fits(
    meshes: Iterable[Sizes], plan: Callable[[Sizes], Plan], topology: Topology, advice: str
) -> tuple[Plan, tuple[str, ...]]:
    """The plan of the first mesh that has the memory, and why those before it were rejected.

    Args:
      meshes: in the order in which they are tried.
      plan: compiles for one of them; raises DoesNotFit where it cannot be.
      topology: the slice.
      advice: ends "no mesh of this slice ..." where none fits.

    Raises:
      DoesNotFit: none fits.
    """
    available = tpu(topology.chip).memory
    rejected: list[str] = []
    for sizes in meshes:
        try:
            planned = plan(sizes)
        except DoesNotFit as error:
            rejected.append(f"{sizes}: {error}")
            continue
        if planned.memory <= available:
            return planned, tuple(rejected)
        rejected.append(
            f"{sizes}: needs {planned.memory / 2**30:.2f} of {available / 2**30:.2f} GiB"
        )
    raise DoesNotFit(f"no mesh of {topology.name} {advice}. Tried: " + "; ".join(rejected))


def candidates(sizes: Sizes) -> Iterator[dict[str, int]]:
    """A mesh, and then those of the same devices that split the weights further.

    First `data` goes into `fsdp`, then `fsdp` piece by piece into `tensor`.
    """
    first = dict(sizes)
    yield first
    shards, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    while shards >= 1:
        further = {"data": 1, "fsdp": shards, "tensor": tensor}
        if further != first:
            yield further
        if shards % 2:
            return
        shards, tensor = shards // 2, tensor * 2


def memory_line(memory: int, resident: int, chip: Chip) -> str:
    """Peak bytes against what a chip has."""
    return (
        f"memory per chip {memory / 2**30:.2f} of {tpu(chip).memory / 2**30:.2f} GiB, "
        f"{resident / 2**30:.2f} of it resident"
    )


def program_lines(programs: Sequence[tuple[Program, int]], chip: Chip) -> list[str]:
    """A table of programs and how often each runs, and their collectives."""
    lines = [
        f"{'program':<12}{'runs':>5}{'arguments':>11}{'temporary':>11}{'outputs':>9}"
        f"{'compute ms':>12}{'links ms':>10}{'waits ms':>10}   GiB per chip; one run, or step"
    ]
    for program, runs in programs:
        gib = (size / 2**30 for size in (program.arguments, program.temporaries, program.outputs))
        arguments, temporaries, outputs = gib
        lines.append(
            f"{program.name:<12}{runs:>5}{arguments:>11.2f}{temporaries:>11.2f}{outputs:>9.2f}"
            f"{1e3 * program.compute_seconds(chip):>12.1f}"
            f"{1e3 * program.interconnect_seconds(chip):>10.1f}"
            f"{1e3 * program.waiting_seconds(chip):>10.1f}"
        )
    for program, _ in programs:
        total = max(program.cost.cycles, 1)
        spent = program.cost.parts.items()
        if shares := [f"{part} {100 * cycles / total:.0f} %" for part, cycles in spent]:
            lines.append(f"cycles of {program.name}: {', '.join(shares)}")
    lines.append("collectives of one run, and the bytes that a chip receives at most:")
    for program, _ in programs:
        parts = [
            f"{traffic.executions} {kind} {traffic.bytes / 1e9:.2f} GB"
            for kind, traffic in program.cost.collectives.items()
        ]
        note = f" (of {program.steps} steps)" if program.cost.open_loops else ""
        lines.append(f"  {program.name}: {', '.join(parts) or 'none'}{note}")
        if (apart := program.cost.between_slices).executions:
            lines.append(
                f"    between slices: {apart.executions}, of which a chip sends "
                f"{apart.bytes / 1e6:.1f} MB"
            )
    return lines

"""Roofline times: how fast a chip could be if only peak rates limited it.

A phase takes the longer of its FLOPs at the chip's peak and its memory traffic at the chip's
bandwidth. Activations, norms, launches, padding and host work are free: floors, not forecasts.
"""

import dataclasses

from prumerge_jax.cost import counts
from prumerge_jax.cost.bits import Bits
from prumerge_jax.models.config import LlavaConfig, TextConfig
from prumerge_jax.reductions import Stage


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      flops: FLOP/s at 16 bit, dense.
      bandwidth: bytes/s of the main memory.
      int8_ops: operations/s at 8 bit, or None where no figure is known.
      tpu: what only a plan for a TPU needs.
    """

    flops: float
    bandwidth: float
    int8_ops: float | None = None
    tpu: "Tpu | None" = None

    def achievable(self, compute: float, bandwidth: float) -> "Chip":
        """The chip at these fractions of its peaks."""
        int8_ops = None if self.int8_ops is None else compute * self.int8_ops
        return Chip(compute * self.flops, bandwidth * self.bandwidth, int8_ops, self.tpu)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU chip as programs compiled for it see it.

    Attributes:
      kind: its device kind in JAX.
      memory: bytes of main memory that XLA lets a program use.
      interconnect: bytes/s that all its links to other chips deliver together.
      clock: Hz of the cycles in which XLA estimates; the peak FLOP/s over those of one cycle.
    """

    kind: str
    memory: float
    interconnect: float
    clock: float


CHIPS = {
    "v100": Chip(112e12, 0.900e12, int8_ops=62e12),  # as LLM-Viewer has it
    "a100": Chip(312e12, 2.04e12, int8_ops=624e12),
    "h100": Chip(989e12, 3.35e12, int8_ops=1979e12),
    "h200": Chip(989e12, 4.8e12, int8_ops=1979e12),
    "tpu-v5e": Chip(197e12, 0.819e12, 394e12, tpu=Tpu("TPU v5 lite", 15.75 * 2**30, 200e9, 1.5e9)),
    "tpu-v5p": Chip(459e12, 2.765e12, 918e12, tpu=Tpu("TPU v5", 95.74 * 2**30, 600e9, 1.75e9)),
    "tpu-v6e": Chip(
        918e12, 1.640e12, 1836e12, tpu=Tpu("TPU v6 lite", 31.25 * 2**30, 400e9, 1.75e9)
    ),
    "tpu7x": Chip(2307e12, 7.380e12),
}
"""Datasheet peaks."""


FRONT_TOKENS = 35
"""Text tokens in front of the image in LLaVA-1.5's prompts."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch of equal requests with one image each.

    Attributes:
      visual_tokens: per image; a measured mean may be fractional. All N patches mean no reduction.
      text_tokens: prompt tokens per request.
      batch: requests computed together.
      output_tokens: per request; the first one comes from the prefill.
      bits: bits per weight of the decoder's blocks, and of keys and values.
      crops_per_image: what the tower sees of an image, or frames of a video.
      questions_per_image: requests that have their image, and `FRONT_TOKENS` of their text in front
        of it, in common; both are computed once for all of them.
      tower_stages: merges inside the tower.
    """

    visual_tokens: float
    text_tokens: float
    batch: int = 1
    output_tokens: int = 1
    bits: Bits = Bits()
    questions_per_image: int = 1
    crops_per_image: int = 1
    tower_stages: tuple[Stage, ...] = ()

    @property
    def sequence(self) -> float:
        """Tokens per request."""
        return self.visual_tokens + self.text_tokens

    @property
    def shared(self) -> float:
        """Those that it shares with others."""
        if self.questions_per_image == 1:
            return 0.0
        return self.visual_tokens + min(FRONT_TOKENS, self.text_tokens)

    @property
    def computed(self) -> float:
        """Tokens to prefill per request."""
        return self.sequence - self.shared + self.shared / self.questions_per_image

    @property
    def images(self) -> float:
        """Images of the batch."""
        return self.batch / self.questions_per_image

    @property
    def crops(self) -> float:
        """Crops of the batch."""
        return self.images * self.crops_per_image


@dataclasses.dataclass(frozen=True)
class Operation:
    """Work that overlaps freely within itself and not with what comes before or after."""

    flops: float
    bytes: float
    int8_flops: float = 0.0
    """Of `flops`, those of int8 numbers."""

    def seconds(self, chip: Chip) -> float:
        """Roofline time."""
        return max(self._compute_seconds(chip), self.bytes / chip.bandwidth)

    def bound(self, chip: Chip) -> str:
        """`compute` or `memory`, whichever takes longer."""
        return "compute" if self._compute_seconds(chip) >= self.bytes / chip.bandwidth else "memory"

    def _compute_seconds(self, chip: Chip) -> float:
        if not self.int8_flops:
            return self.flops / chip.flops
        if chip.int8_ops is None:
            raise ValueError("products of int8 numbers need Chip.int8_ops, which is not known")
        return (self.flops - self.int8_flops) / chip.flops + self.int8_flops / chip.int8_ops


def operations(config: LlavaConfig, workload: Workload) -> dict[str, list[Operation]]:
    """Per component (`vision`, `merge`, `projector`, `prefill`, `decode`) what the batch computes.

    Components without work (`merge` at all N tokens, `decode` at one output token) are empty lists;
    `decode` has one operation per step.
    """
    sizes = counts.parameters(config)
    text, batch, images = config.text, workload.batch, workload.images
    weights = counts.decoder_bytes(config, workload.bits)
    kv = batch * counts.kv_bytes_per_token(text, workload.bits)
    of_blocks = 2 * batch * counts.block_parameters(text)
    int8_token = of_blocks * counts.int8_share(text, workload.bits)
    patches = config.vision.num_patches
    # PruMerge reads the hidden state and the key of every patch.
    image_bytes = 2 * patches * config.vision.width * counts.ACTIVATION_BYTES
    crops = workload.crops
    merge = Operation(crops * counts.merge_flops(config.vision), crops * image_bytes)
    projected = images * workload.visual_tokens * counts.projector_flops(config)
    contexts = [workload.sequence + step for step in range(1, workload.output_tokens)]
    return {
        "vision": [
            Operation(
                crops * counts.staged_tower_flops(config.vision, workload.tower_stages),
                counts.ACTIVATION_BYTES * sizes.vision_used,
            )
        ],
        "merge": [merge] if workload.visual_tokens < patches * workload.crops_per_image else [],
        "projector": [Operation(projected, counts.ACTIVATION_BYTES * sizes.projector)],
        "prefill": [
            Operation(
                batch * _prefill_flops(text, workload),
                weights + kv * workload.computed,
                int8_token * workload.computed,
            )
        ],
        "decode": [
            Operation(
                batch * counts.decode_flops(text, context), weights + kv * context, int8_token
            )
            for context in contexts
        ],
    }


def _prefill_flops(text: TextConfig, workload: Workload) -> float:
    """The decoder over one request's part of the batch: its own tokens, which see what it shares
    too, and its part of the shared ones."""
    flops = counts.prefill_flops(text, workload.computed)
    if workload.questions_per_image == 1:
        return flops
    own, shared = workload.sequence - workload.shared, workload.shared
    pairs = own * (shared + own / 2) + shared * shared / 2 / workload.questions_per_image
    return flops + counts.attention_flops(text, pairs - workload.computed**2 / 2)


def floor_seconds(config: LlavaConfig, workload: Workload, chip: Chip) -> dict[str, float]:
    """Roofline time of the batch per component; their sum is the floor of the batch."""
    return {
        component: sum(operation.seconds(chip) for operation in steps)
        for component, steps in operations(config, workload).items()
    }


def images_per_second(config: LlavaConfig, workload: Workload, chip: Chip) -> float:
    """The rate that no implementation of this workload exceeds on one such chip."""
    return workload.batch / sum(floor_seconds(config, workload, chip).values())

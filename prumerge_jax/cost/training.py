"""Memory and time of a micro-batch of LoRA training on one chip, as closed forms.

The forms are those of `models/remat.py`: a scan over layers that keeps its carry and what the
policy names. Compared with XLA's plans for TPUs in tests/training/test_fit.py.
"""

import dataclasses
import math
from collections.abc import Mapping

from prumerge_jax.cost import counts
from prumerge_jax.cost.counts import ACTIVATION_BYTES
from prumerge_jax.cost.roofline import Chip
from prumerge_jax.models.config import TextConfig, decoder_linears

ASSUMED_SHARE = 0.6
"""Share of the peak FLOP/s at which a micro-batch is assumed to run."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one chip computes of a micro-batch.

    Attributes:
      text: sizes of the decoder.
      rank: of the adapters; 0 without.
      rows: rows per data shard.
      length: tokens of a row.
      logit_positions: those whose logits exist at a time.
      fsdp, tensor: sizes of these axes of the mesh.
      replicated: whether the frozen weights are not sharded over `fsdp`.
    """

    text: TextConfig
    rank: int
    rows: int
    length: int
    logit_positions: int
    fsdp: int = 1
    tensor: int = 1
    replicated: bool = False

    @property
    def positions(self) -> int:
        """Tokens of all its rows."""
        return self.rows * self.length


def kept_bytes(batch: MicroBatch, remat: str) -> float:
    """Bytes that all layers keep for the backward pass, their carries included."""
    per_position = batch.text.width + _kept_numbers(batch.text, remat, batch.rank) / batch.tensor
    return ACTIVATION_BYTES * batch.text.num_layers * batch.positions * per_position


def working_bytes(batch: MicroBatch, remat: str) -> float:
    """Bytes of a micro-batch beside what is resident: what is kept, the weights that are gathered,
    the adapters' gradients, and what exists at once of a layer or of the logits."""
    text = batch.text
    layer = counts.block_parameters(text) / text.num_layers
    # A layer's weights are gathered while the one before is computed.
    gathered = 2 * layer if _gathers(batch) else 0.0
    head = 2 * text.vocab_size * text.width  # gathered, or its transpose, with the embedding
    weights = ACTIVATION_BYTES * (gathered + head) / batch.tensor
    trained = counts.lora_parameters(text, batch.rank) if batch.rank else 0
    gradients = 4 * trained / (batch.fsdp * batch.tensor)
    at_once = batch.positions * (8 * text.width + 6 * text.mlp_width) / batch.tensor
    logits = 3 * 4 * batch.rows * batch.logit_positions * text.vocab_size
    at_once = max(ACTIVATION_BYTES * at_once, logits / batch.tensor)
    return kept_bytes(batch, remat) + weights + gradients + at_once


def micro_batch_seconds(batch: MicroBatch, remat: str, chip: Chip) -> float:
    """Estimated time on a chip, where the gathers of weights overlap with the products."""
    return max(_compute_seconds(batch, remat, chip), _gather_seconds(batch, chip))


def rows_that_hide_gathers(batch: MicroBatch, remat: str, chip: Chip) -> int:
    """The fewest rows whose products take as long as the gathers of the weights."""
    one = dataclasses.replace(batch, rows=1)
    return math.ceil(_gather_seconds(one, chip) / _compute_seconds(one, remat, chip)) or 1


def _gathers(batch: MicroBatch) -> bool:
    return batch.fsdp > 1 and not batch.replicated


def _kept_numbers(text: TextConfig, remat: str, rank: int) -> float:
    """Numbers kept per position and layer beside the carry."""
    linears = decoder_linears(text)
    wide = 2 * text.mlp_width
    adapters = rank * len(linears)
    products = sum(d_out for _, d_out in linears.values())
    attended = text.num_heads * (text.head_dim + 2)  # and a float32 for each head
    numbers: Mapping[str, float] = {
        "full": 0,
        "wide": wide + adapters,
        # The last linear layer's output is in the next carry.
        "dots": products - text.width + adapters + attended,
        # As XLA plans it for 7B: every intermediate value, some in float32.
        "none": 16 * text.width + 12 * text.mlp_width,
    }
    return numbers[remat]


def _compute_seconds(batch: MicroBatch, remat: str, chip: Chip) -> float:
    linears = {name: i * o for name, (i, o) in decoder_linears(batch.text).items()}
    widening = linears["gate_proj"] + linears["up_proj"]
    again = {"full": sum(linears.values()) - linears["down_proj"]}
    again["wide"] = again["full"] - widening
    head = batch.text.width * batch.text.vocab_size
    frozen = 4 * (sum(linears.values()) * batch.text.num_layers + head)
    repeated = 2 * again.get(remat, 0) * batch.text.num_layers
    adapters = 6 * (counts.lora_parameters(batch.text, batch.rank) if batch.rank else 0)
    attention = 3 * counts.attention_flops(batch.text, batch.length / 2)
    flops = batch.positions * (frozen + repeated + adapters + attention) / batch.tensor
    return flops / (ASSUMED_SHARE * chip.flops)


def _gather_seconds(batch: MicroBatch, chip: Chip) -> float:
    """All weights of the layers, forward and backward; 0 where the links are not known."""
    if chip.tpu is None or not _gathers(batch):
        return 0.0
    received = counts.block_parameters(batch.text) * (1 - 1 / batch.fsdp) / batch.tensor
    return 2 * ACTIVATION_BYTES * received / chip.tpu.interconnect

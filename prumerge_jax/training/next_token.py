"""The loss of a language model on packed rows, with or without pictures."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.sharding.mesh import constrain
from prumerge_jax.training.parameters import Leaf

# Positions per row whose logits exist at a time: [2048, 32000] float32 would be 262 MB per row.
_CHUNK = 256


class RowBatch(NamedTuple):
    """A micro-batch on the device; the fields [rows, T] int32 are those of `packing.Rows`.

    Attributes:
      visual_tokens: [B, R, Dv] of all images of the global batch; its dtype is the compute dtype.
    """

    ids: Leaf
    visual_index: Leaf
    positions: Leaf
    segment_ids: Leaf
    targets: Leaf
    visual_tokens: Leaf


def next_token_loss(
    model: LlavaModel,
    batch: RowBatch,
    *,
    dropout_key: jax.Array | None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in nats, summed over the target tokens, and their number; both float32.

    Args:
      model: its tower is not run.
      batch: packed rows; each segment sees only itself.
      dropout_key: of the adapters' dropout; None for none.
      remat: see `layers.rematerialise`.
    """
    x = model.embed_rows(batch.ids, batch.visual_tokens, batch.visual_index)
    hidden = model.decoder(
        constrain(x, "batch", None, None),
        batch.positions,
        batch.segment_ids,
        remat=remat,
        dropout_key=dropout_key,
    )
    count = (batch.targets != IGNORE).sum(dtype=jnp.float32)
    return _cross_entropy(model.decoder, hidden, batch.targets), count


def _cross_entropy(decoder: Llama, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over the targets [rows, T] of -log p, computing logits a chunk of columns at a time."""
    rows, length, width = hidden.shape
    chunk = min(_CHUNK, length)
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, chunk, width)
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    targets = targets.reshape(rows, -1, chunk)

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, targets = part
        logits = constrain(decoder.logits(hidden), "batch", None, "vocab")
        # A comparison instead of a gather: on a sharded vocabulary a gather would collect it.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(is_target, logits, 0).sum(-1)
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.where(targets != IGNORE, loss, 0).sum(), None

    parts = (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
    total, _ = jax.lax.scan(add, jnp.zeros(()), parts)
    return total

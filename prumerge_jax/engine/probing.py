"""What the last token of a prompt attends to, layer by layer, read off packed rows."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.data import packing
from prumerge_jax.data.asking import asking_columns
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.windows import Window


class SequenceAttention(NamedTuple):
    """Attention of the last token of a request's prompt.

    Attributes:
      key: the request's.
      values: float32 [L, T], mean over heads of each layer; T counts visual tokens.
      is_visual: bool [T].
    """

    key: int
    values: np.ndarray
    is_visual: np.ndarray


def sequence_attention(
    model: PlacedModel, window: Window, rows: packing.Rows
) -> Iterator[SequenceAttention]:
    """The attention of every sequence in packed rows that share no prefixes."""
    asking = asking_columns(rows)
    found = _attention(
        model.graphdef, model.state, window.pool, model.put_rows(rows), model.put(asking)
    )
    values = np.asarray(found).reshape(len(found), -1)
    visual = rows.visual_index.reshape(-1) >= 0
    for place, request in enumerate(rows.requests.tolist()):
        at = rows.positions_of(place)
        yield SequenceAttention(window.requests[request].key, values[:, at], visual[at])


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _attention(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    visual_tokens: jax.Array,
    rows: programs.Rows,
    asking: jax.Array,
) -> jax.Array:
    """[L, rows, T] float32 of the tokens in the columns asking [rows, T]."""
    model = nnx.merge(graphdef, state)
    x = model.embed_rows(rows.ids, visual_tokens, rows.visual_index, rows.visual_weight)
    return model.decoder.attention_from(
        x,
        rows.positions,
        rows.segment_ids,
        (jnp.arange(asking.shape[1]) == asking).astype(jnp.float32),
        key_bias=model.key_bias(visual_tokens, rows.visual_index),
    )

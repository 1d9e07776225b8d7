"""The jitted functions of inference. Each has one shape per engine, so each compiles once.

The host decides what goes where (`windows.py`, `decoding.py`); nothing here reads a value on the
host.

Axes: B images, R capacity, T row length, S slots, M pages of a sequence, G segments, E stop ids, N
positions of the head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.engine.sampling import Sampling, draw, is_stop
from prumerge_jax.models import attention
from prumerge_jax.models.attention import KVPages
from prumerge_jax.models.config import MAX_STOP_IDS
from prumerge_jax.models.frames import FrameForm
from prumerge_jax.models.llama import PartialHidden
from prumerge_jax.models.llava import embed_question, encode_images
from prumerge_jax.models.token_drops import plan_of
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Drops, Reduction
from prumerge_jax.sharding.mesh import constrain


class Rows(NamedTuple):
    """The device's part of `data.packing.Rows`, each [rows, T] int32.

    Where visual tokens are interpolated, `visual_index` is [rows, T, K], see
    `LlavaModel.embed_rows`, and `visual_weight` [rows, T, K] float32.
    With `branch_ids` and without are two forms of the functions that take rows. `asking` is there
    for reductions that drop tokens, see `asking_columns`.
    """

    ids: jax.Array
    visual_index: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    visual_weight: jax.Array | None = None
    branch_ids: jax.Array | None = None
    asking: jax.Array | None = None


class Slots(NamedTuple):
    """Sequences being decoded, one per slot.

    Attributes:
      lengths: [S] int32, tokens whose keys and values are in pages.
      positions: [S] int32, rotary position of `token`.
      token: [S] int32, the newest token, not yet in a page.
      remaining: [S] int32, tokens that may still follow; 0 means an idle slot.
      drawn: [S] int32, tokens drawn so far.
      sampling: how each sequence's tokens are drawn, and which end it.
    """

    lengths: jax.Array
    positions: jax.Array
    token: jax.Array
    remaining: jax.Array
    drawn: jax.Array
    sampling: Sampling


def over_data_shards(slots: Slots) -> Slots:
    """The slots with every array over the data shards of the current mesh.

    All functions that return slots do so, so that each takes what another returned without being
    compiled again.
    """
    lengths, positions, token, remaining, drawn = (constrain(x, "batch") for x in slots[:5])
    sampling = Sampling(*(constrain(x, "batch", *[None] * (x.ndim - 1)) for x in slots.sampling))
    return Slots(lengths, positions, token, remaining, drawn, sampling)


class Segments(NamedTuple):
    """Sequences in rows, and how each continues.

    Attributes:
      row: [G] int32, the row of each.
      last: [G] int32, the column of the last token of its prompt.
      length: [G] int32, tokens of its prompt. 0 means no segment.
      position: [G] int32, rotary position of the token that follows it.
      max_new_tokens: [G] int32, most tokens to generate.
      sampling: how tokens are drawn.
    """

    row: jax.Array
    last: jax.Array
    length: jax.Array
    position: jax.Array
    max_new_tokens: jax.Array
    sampling: Sampling


@functools.partial(jax.jit, static_argnames=("graphdef", "reduction", "dtype", "form", "slots"))
def encode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    question_ids: jax.Array | None = None,
    present: jax.Array | None = None,
    first_frame: jax.Array | None = None,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
    form: FrameForm | None = None,
    slots: int | None = None,
) -> VisualTokens:
    """[B, S, S, 3] uint8 -> reduced visual tokens of capacity R; arguments as in `encode_images`.

    Question ids are -1 beyond the question; None where the reduction reads none.
    """
    model = nnx.merge(graphdef, state)
    return encode_images(
        model.tower(is_video=form is not None),
        pixels,
        reduction,
        dtype=dtype,
        projector=model.projector,
        question=embed_question(model.decoder, question_ids, dtype),
        present=present,
        first_frame=first_frame,
        form=form,
        slots=slots,
    )


@functools.partial(jax.jit, static_argnames=("capacity",))
def join(batches: list[jax.Array], *, capacity: int) -> jax.Array:
    """Encoded batches [B, R, D] interleaved, [B * len(batches), capacity, D]: row j of batch b
    becomes row j * len(batches) + b, so that on a mesh no image moves to another device."""
    stacked = jnp.stack(batches, axis=1)
    joined = stacked.reshape(-1, *stacked.shape[2:])
    joined = jnp.pad(joined, ((0, 0), (0, capacity - joined.shape[1]), (0, 0)))
    return constrain(joined, "batch", None, None)


@functools.partial(jax.jit, static_argnames=("pages", "page_size", "graphdef", "dtype", "key_bias"))
def empty_pages(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    *,
    pages: int,
    page_size: int,
    dtype: jnp.dtype,
    key_bias: bool = False,
) -> KVPages:
    """A pool of `pages` pages per layer, created in its shards."""
    config = nnx.merge(graphdef, state).decoder.config
    return attention.empty_pages(config, pages, page_size, dtype, key_bias=key_bias)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "max_segment_length", "drops"), donate_argnames=("pages",)
)
def prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pages: KVPages,
    visual_tokens: jax.Array,
    rows: Rows,
    places: jax.Array,
    *,
    max_segment_length: int,
    drops: Drops | None = None,
) -> tuple[jax.Array, KVPages]:
    """Runs packed rows, whose segments have at most `max_segment_length` tokens.

    Args:
      graphdef, state: the model.
      pages: donated.
      visual_tokens: [B, R, Dv].
      rows: the plan.
      places: [rows, T] int32, where each token's keys and values go (`attention.write_to_pages`).
      max_segment_length: see `attention.attend`.
      drops: which visual tokens leave the layers; the pool then keeps a bias with every key.

    Returns:
      Hidden states [rows, T, D], and the pool.
    """
    model = nnx.merge(graphdef, state)
    x = model.embed_rows(rows.ids, visual_tokens, rows.visual_index, rows.visual_weight)
    x = constrain(x, "batch", None, None)
    hidden, pages = model.decoder.prefill(
        x,
        rows.positions,
        rows.segment_ids,
        pages,
        places,
        branch_ids=rows.branch_ids,
        key_bias=model.key_bias(visual_tokens, rows.visual_index),
        drop_plan=plan_of(drops, rows.visual_index, rows.asking),
        max_segment_length=max_segment_length,
    )
    return hidden, attention.over_shards(pages)


@functools.partial(jax.jit, static_argnames=("num_layers",), donate_argnames=("pages",))
def copy_in_pages(
    pages: KVPages, source: jax.Array, target: jax.Array, *, num_layers: int
) -> KVPages:
    """Copies keys and values from places to places; see `attention.copy_in_pages`."""
    copied = attention.copy_in_pages(pages, source, target, num_layers)
    return attention.over_shards(copied)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segment_length", "drops"))
def hidden_before_last_mlp(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    visual_tokens: jax.Array,
    rows: Rows,
    *,
    max_segment_length: int,
    drops: Drops | None = None,
) -> PartialHidden:
    """`prefill` for scoring: no keys and values are kept, and `log_likelihoods` finishes what it
    needs."""
    model = nnx.merge(graphdef, state)
    x = model.embed_rows(rows.ids, visual_tokens, rows.visual_index, rows.visual_weight)
    x = constrain(x, "batch", None, None)
    return model.decoder.hidden_before_last_mlp(
        x,
        rows.positions,
        rows.segment_ids,
        branch_ids=rows.branch_ids,
        key_bias=model.key_bias(visual_tokens, rows.visual_index),
        drop_plan=plan_of(drops, rows.visual_index, rows.asking),
        max_segment_length=max_segment_length,
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def log_likelihoods(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    partial: PartialHidden,
    index: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    """log p(target) at N positions.

    Args:
      graphdef, state: the model.
      partial: rows from `hidden_before_last_mlp`.
      index: [N] int32 into the flattened rows.
      targets: [N] int32 token ids.

    Returns:
      [N] float32, natural logarithm.
    """
    decoder = nnx.merge(graphdef, state).decoder
    logits = decoder.logits(decoder.last_mlp_at(partial, index))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def logits_at(
    graphdef: nnx.GraphDef, state: nnx.State, partial: PartialHidden, index: jax.Array
) -> jax.Array:
    """Next-token logits [M, V] float32 at M positions, index [M] int32 into the flattened rows.

    `partial` is of rows from `hidden_before_last_mlp`.
    """
    decoder = nnx.merge(graphdef, state).decoder
    return decoder.logits(decoder.last_mlp_at(partial, index))


@functools.partial(jax.jit, static_argnames=("graphdef",))
def first_tokens(
    graphdef: nnx.GraphDef, state: nnx.State, hidden: jax.Array, segments: Segments
) -> jax.Array:
    """The first generated token of every segment, [G] int32."""
    decoder = nnx.merge(graphdef, state).decoder
    logits = decoder.logits(hidden[segments.row, segments.last])
    return draw(logits, segments.sampling, jnp.zeros_like(segments.row))


@functools.partial(jax.jit, static_argnames=("slots",))
def empty_slots(*, slots: int) -> Slots:
    """Idle slots."""
    zeros = jnp.zeros((slots,), jnp.int32)
    idle = Slots(
        lengths=zeros,
        positions=zeros,
        token=zeros,
        remaining=zeros,
        drawn=zeros,
        sampling=Sampling(
            temperature=jnp.zeros((slots,)),
            top_p=jnp.ones((slots,)),
            seed=zeros.astype(jnp.uint32),
            stop_ids=jnp.full((slots, MAX_STOP_IDS), -1, jnp.int32),
        ),
    )
    return over_data_shards(idle)


@functools.partial(jax.jit, donate_argnames=("slots",))
def seat(slots: Slots, segments: Segments, first: jax.Array, slot_of: jax.Array) -> Slots:
    """Gives segments slots. One whose first token ends it leaves its slot idle.

    Args:
      slots: donated.
      segments: G segments.
      first: [G] int32 from `first_tokens`.
      slot_of: [G] int32, the slot a segment goes to; -1 means none.
    """
    # Beyond the last slot, where writes are dropped.
    at = jnp.where(slot_of >= 0, slot_of, len(slots.lengths))
    follow = jnp.where(is_stop(first, segments.sampling), 0, segments.max_new_tokens - 1)

    def put(ours: jax.Array, theirs: jax.Array) -> jax.Array:
        return ours.at[at].set(theirs, mode="drop")

    seated = Slots(
        lengths=put(slots.lengths, segments.length),
        positions=put(slots.positions, segments.position),
        token=put(slots.token, first),
        remaining=put(slots.remaining, follow),
        drawn=put(slots.drawn, jnp.ones_like(first)),
        sampling=Sampling(*map(put, slots.sampling, segments.sampling)),
    )
    return over_data_shards(seated)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "steps"),
    donate_argnames=("slots", "pages"),
)
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    pages: KVPages,
    tables: jax.Array,
    active: jax.Array,
    *,
    steps: int,
) -> tuple[Slots, KVPages, jax.Array]:
    """Up to `steps` tokens for every busy slot; stops early when all are idle.

    Args:
      graphdef, state: the model.
      slots: donated.
      pages: donated.
      tables: [S, M] int32, the pages of each slot's sequence, with room for `steps` tokens more.
      active: [S] bool; other slots wait.
      steps: most steps.

    Returns:
      The slots, the pool, and the tokens [steps, S] int32, -1 where a slot was idle.
    """
    model = nnx.merge(graphdef, state)
    dtype, size = pages.k.dtype, pages.k.shape[2]

    def running(carry: tuple[jax.Array, Slots, KVPages, jax.Array]) -> jax.Array:
        step, slots, _, _ = carry
        return (step < steps) & ((slots.remaining > 0) & active).any()

    def advance(
        carry: tuple[jax.Array, Slots, KVPages, jax.Array],
    ) -> tuple[jax.Array, Slots, KVPages, jax.Array]:
        step, slots, pages, emitted = carry
        busy = (slots.remaining > 0) & active
        x = model.decoder.embed(slots.token[:, None], dtype)
        nth, offset = jnp.divmod(slots.lengths, size)
        page = jnp.take_along_axis(tables, nth[:, None], axis=1, mode="clip")[:, 0]
        hidden, pages = model.decoder.decode(
            x,
            slots.positions,
            pages,
            tables,
            jnp.where(busy, page * size + offset, -1),
            jnp.where(busy, slots.lengths + 1, 0),
        )
        logits = model.decoder.logits(hidden[:, 0])
        # Stale temperatures of idle slots must not make the others pay for sampling.
        temperature = jnp.where(busy, slots.sampling.temperature, 0)
        token = draw(logits, slots.sampling._replace(temperature=temperature), slots.drawn)
        left = jnp.where(is_stop(token, slots.sampling), 0, slots.remaining - 1)
        slots = Slots(
            lengths=slots.lengths + busy,
            positions=slots.positions + busy,
            token=jnp.where(busy, token, slots.token),
            remaining=jnp.where(busy, left, slots.remaining),
            drawn=slots.drawn + busy,
            sampling=slots.sampling,
        )
        return step + 1, slots, pages, emitted.at[step].set(jnp.where(busy, token, -1))

    emitted = jnp.full((steps, len(slots.remaining)), -1, jnp.int32)
    carry = (jnp.int32(0), slots, pages, emitted)
    _, slots, pages, emitted = jax.lax.while_loop(running, advance, carry)
    return over_data_shards(slots), attention.over_shards(pages), emitted

"""The compiled programs of inference. Each has one shape per engine, so each compiles once.

The host decides what goes where (`engine.py`); nothing here looks at a value on the host.

Axes: B images, R capacity, T row length, S slots, C cache length, M positions of the head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.models.llama import KVCache, PartialHidden, empty_cache
from prumerge_jax.models.llava import encode_images
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import constrain


class Rows(NamedTuple):
    """The device's part of `data.packing.Rows`, each [rows, T] int32."""

    ids: jax.Array
    visual_index: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


class Slots(NamedTuple):
    """Sequences being decoded, one per slot.

    Attributes:
      cache: keys and values, [L, S, C, K, Dh] each.
      lengths: [S] int32, valid entries of the cache.
      positions: [S] int32, rotary position of `token`.
      token: [S] int32, the newest token, not yet in the cache.
      remaining: [S] int32, tokens that may still follow; 0 is an idle slot.
      seeds: [S] uint32, the random seed of each sequence.
      drawn: [S] int32, tokens drawn so far.
    """

    cache: KVCache
    lengths: jax.Array
    positions: jax.Array
    token: jax.Array
    remaining: jax.Array
    seeds: jax.Array
    drawn: jax.Array


class Segments(NamedTuple):
    """Where sequences lie in rows, and how each goes on; every field [G].

    Attributes:
      row, start, length: place of the prompt in the rows. A length of 0 is no segment.
      max_new_tokens: tokens to generate.
      seed: uint32, random seed.
    """

    row: jax.Array
    start: jax.Array
    length: jax.Array
    max_new_tokens: jax.Array
    seed: jax.Array


class Sampling(NamedTuple):
    """How a token is drawn. Temperature 0 is greedy; `top_p` 1 draws from all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0


@functools.partial(jax.jit, static_argnames=("graphdef", "reduction", "dtype"))
def encode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> VisualTokens:
    """[B, S, S, 3] uint8 -> reduced visual tokens of capacity R."""
    vision = nnx.merge(graphdef, state).vision
    return encode_images(vision, pixels, reduction, dtype=dtype)


@jax.jit
def join(batches: list[jax.Array]) -> jax.Array:
    """Encoded batches [B, R, D] side by side, [B * len(batches), R, D]: row j of batch b becomes
    row j * len(batches) + b, so that on a mesh every image stays where it is."""
    stacked = jnp.stack(batches, axis=1)
    return constrain(stacked.reshape(-1, *stacked.shape[2:]), "batch", None, None)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segment_length"))
def prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    visual_tokens: jax.Array,
    rows: Rows,
    *,
    max_segment_length: int,
) -> tuple[jax.Array, KVCache]:
    """Runs packed rows, whose segments have at most `max_segment_length` tokens.

    Returns:
      Hidden states [rows, T, D] and the rows' keys and values.
    """
    model = nnx.merge(graphdef, state)
    x = constrain(model.embed_rows(rows.ids, visual_tokens, rows.visual_index), "batch", None, None)
    return model.decoder.prefill(
        x,
        rows.positions,
        rows.segment_ids,
        max_segment_length=max_segment_length,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segment_length"))
def hidden_before_last_mlp(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    visual_tokens: jax.Array,
    rows: Rows,
    *,
    max_segment_length: int,
) -> PartialHidden:
    """`prefill` for scoring: no cache is kept, and `log_likelihoods` finishes what it needs."""
    model = nnx.merge(graphdef, state)
    x = constrain(model.embed_rows(rows.ids, visual_tokens, rows.visual_index), "batch", None, None)
    return model.decoder.hidden_before_last_mlp(
        x,
        rows.positions,
        rows.segment_ids,
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
    """log p(target) at M positions.

    Args:
      graphdef, state: the model.
      partial: rows from `hidden_before_last_mlp`.
      index: [M] int32 into the flattened rows.
      targets: [M] int32 token ids.

    Returns:
      [M] float32, natural logarithm.
    """
    decoder = nnx.merge(graphdef, state).decoder
    logits = decoder.logits(decoder.last_mlp_at(partial, index))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def first_tokens(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    hidden: jax.Array,
    segments: Segments,
    *,
    sampling: Sampling,
) -> jax.Array:
    """The first generated token of every segment, [G] int32."""
    decoder = nnx.merge(graphdef, state).decoder
    last = jnp.maximum(segments.start + segments.length - 1, 0)
    logits = decoder.logits(hidden[segments.row, last])
    return draw(logits, segments.seed, jnp.zeros_like(segments.row), sampling)


def draw(logits: jax.Array, seeds: jax.Array, drawn: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row of logits [S, V]; the draw depends on the row's own seed and step only."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # The smallest set whose probability reaches top_p: its least likely member is the bound.
        size = (before < sampling.top_p).sum(-1, keepdims=True)
        bound = jnp.take_along_axis(ordered, jnp.minimum(size, logits.shape[-1] - 1), axis=-1)
        logits = jnp.where(logits < bound, -jnp.inf, logits)

    def one(logits: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits)

    return jax.vmap(one)(logits, seeds, drawn).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "length", "dtype"))
def empty_slots(
    graphdef: nnx.GraphDef, state: nnx.State, *, slots: int, length: int, dtype: jnp.dtype
) -> Slots:
    """Idle slots; the cache is created in its shards."""
    config = nnx.merge(graphdef, state).decoder.config
    zeros = jnp.zeros((slots,), jnp.int32)
    return Slots(
        cache=empty_cache(config, slots, length, dtype),
        lengths=zeros,
        positions=zeros,
        token=zeros,
        remaining=zeros,
        seeds=zeros.astype(jnp.uint32),
        drawn=zeros,
    )


@functools.partial(jax.jit, static_argnames=("eos",), donate_argnames=("slots",))
def insert(
    slots: Slots,
    rows_cache: KVCache,
    rows: Rows,
    segments: Segments,
    first: jax.Array,
    slot_of: jax.Array,
    *,
    eos: int,
) -> Slots:
    """Moves segments from packed rows into slots.

    Args:
      slots: donated.
      rows_cache: [L, rows, T, K, Dh] each, from `prefill`.
      rows: the plan, for the positions.
      segments: G segments of these rows.
      first: [G] int32 from `first_tokens`.
      slot_of: [G] int32, the slot a segment goes to; -1 stays where it is.
      eos: a sequence whose first token is this one leaves its slot idle.
    """
    capacity = slots.cache.k.shape[2]
    offsets = jnp.arange(capacity)

    def move(g: jax.Array, slots: Slots) -> Slots:
        row, start, length = segments.row[g], segments.start[g], segments.length[g]
        source = jnp.minimum(start + offsets, rows.ids.shape[1] - 1)
        inside = (offsets < length)[:, None, None]
        # A segment that stays goes behind the last slot, where writes are dropped. A `jax.lax.cond`
        # in its place makes XLA copy the whole cache, on GPUs for every segment.
        at = jnp.where(slot_of[g] >= 0, slot_of[g], len(slots.lengths))

        def place(cache: jax.Array, packed: jax.Array) -> jax.Array:
            # Zero behind the prompt: the slot may have held NaN, and 0 * NaN is NaN.
            segment = jnp.where(inside, packed[:, row][:, source], 0).astype(cache.dtype)
            return cache.at[:, at].set(segment)

        remaining = jnp.where(first[g] == eos, 0, segments.max_new_tokens[g] - 1)
        position = rows.positions[row, start + length - 1] + 1
        return Slots(
            cache=KVCache(place(slots.cache.k, rows_cache.k), place(slots.cache.v, rows_cache.v)),
            lengths=slots.lengths.at[at].set(length),
            positions=slots.positions.at[at].set(position),
            token=slots.token.at[at].set(first[g]),
            remaining=slots.remaining.at[at].set(remaining),
            seeds=slots.seeds.at[at].set(segments.seed[g]),
            drawn=slots.drawn.at[at].set(1),
        )

    return jax.lax.fori_loop(0, len(slot_of), move, slots)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "steps", "eos", "sampling"),
    donate_argnames=("slots",),
)
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    *,
    steps: int,
    eos: int,
    sampling: Sampling,
) -> tuple[Slots, jax.Array]:
    """Up to `steps` tokens for every busy slot; stops early when all are idle.

    Returns:
      The slots and the tokens [steps, S] int32, -1 where a slot was idle.
    """
    model = nnx.merge(graphdef, state)
    dtype = slots.cache.k.dtype

    def running(carry: tuple[jax.Array, Slots, jax.Array]) -> jax.Array:
        step, slots, _ = carry
        return (step < steps) & (slots.remaining > 0).any()

    def advance(
        carry: tuple[jax.Array, Slots, jax.Array],
    ) -> tuple[jax.Array, Slots, jax.Array]:
        step, slots, emitted = carry
        busy = slots.remaining > 0
        x = model.decoder.embed(slots.token[:, None], dtype)
        # An idle slot writes behind the end of its cache, which drops the write.
        at = jnp.where(busy, slots.lengths, slots.cache.k.shape[2])
        hidden, cache = model.decoder.decode(x, slots.positions, slots.cache, at)
        logits = model.decoder.logits(hidden[:, 0])
        token = draw(logits, slots.seeds, slots.drawn, sampling)
        left = jnp.where(token == eos, 0, slots.remaining - 1)
        slots = Slots(
            cache=cache,
            lengths=slots.lengths + busy,
            positions=slots.positions + busy,
            token=jnp.where(busy, token, slots.token),
            remaining=jnp.where(busy, left, 0),
            seeds=slots.seeds,
            drawn=slots.drawn + busy,
        )
        return step + 1, slots, emitted.at[step].set(jnp.where(busy, token, -1))

    emitted = jnp.full((steps, len(slots.remaining)), -1, jnp.int32)
    _, slots, emitted = jax.lax.while_loop(running, advance, (jnp.int32(0), slots, emitted))
    return slots, emitted

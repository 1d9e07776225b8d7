"""How the next token is drawn from its logits: greedily, or by temperature and nucleus.

Axes: S sequences, E stop ids, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How the tokens of each sequence are drawn; [S] for slots, [G] for segments.

    Attributes:
      temperature: [S] float32; 0 is greedy.
      top_p: [S] float32; 1 draws from all tokens.
      seed: [S] uint32.
      stop_ids: [S, E] int32, tokens that end the sequence; -1 means none.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array
    stop_ids: jax.Array


def draw(logits: jax.Array, sampling: Sampling, drawn: jax.Array) -> jax.Array:
    """One token per row of logits.

    Args:
      logits: [S, V] float32.
      sampling: parameters of each row. A draw depends on the row's seed and step alone.
      drawn: [S] int32, the step: tokens the row has drawn before.

    Returns:
      [S] int32.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_random = sampling.temperature > 0

    def one(logits: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits)

    def sampled() -> jax.Array:
        scaled = logits / jnp.where(is_random, sampling.temperature, 1)[:, None]
        is_cut = is_random & (sampling.top_p < 1)
        scaled = jax.lax.cond(
            is_cut.any(),
            lambda: jnp.where(is_cut[:, None], _nucleus(scaled, sampling.top_p), scaled),
            lambda: scaled,
        )
        tokens = jax.vmap(one)(scaled, sampling.seed, drawn).astype(jnp.int32)
        return jnp.where(is_random, tokens, greedy)

    # Greedy decoding, the common case, needs neither random numbers nor a sorted vocabulary.
    return jax.lax.cond(is_random.any(), sampled, lambda: greedy)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [S, V], -inf outside the smallest set whose probability reaches `top_p` [S]."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # The least likely member of the set is the bound.
    size = (before < top_p[:, None]).sum(-1, keepdims=True)
    bound = jnp.take_along_axis(ordered, jnp.minimum(size, logits.shape[-1] - 1), axis=-1)
    return jnp.where(logits < bound, -jnp.inf, logits)


def is_stop(tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """[S] bool: which tokens [S] end their sequence."""
    return (tokens[:, None] == sampling.stop_ids).any(axis=-1)

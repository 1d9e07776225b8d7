"""Greedy choices of patches: one shape, one `fori_loop`, every image of a batch on its own.

Every rule returns an order in which patches are chosen, so that the prefix of length k is the
answer for a budget of k: one run serves every budget. Ties go to the lowest patch index, and what
decides is float32 at the highest precision.

Axes: B batch, N patches, K steps.
"""

import jax
import jax.numpy as jnp

from prumerge_jax import selection

SHORTEST = 1e-8
"""Length that a shorter vector is divided by, as in the methods' code."""
ROUNDING = 1e-6
"""Relative difference of two gains of `coverage` that is rounding: two patches that cover only
themselves and each other gain exactly the same."""
NEAR_DUPLICATE = 0.95
"""Similarity above which a patch waits for the next block of `coverage`."""


def cosines(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """Cosine similarity of every pair, [B, N, D] and [B, M, D] -> [B, N, M] float32."""
    x = selection.unit_rows(x, SHORTEST)
    y = x if y is None else selection.unit_rows(y, SHORTEST)
    return selection.einsum("bnd,bmd->bnm", x, y)


def first_max(score: jax.Array, available: jax.Array, slack: float = 0.0) -> jax.Array:
    """[B] int32, the available patch of the largest score [B, N], the first among equals.

    Scores within a share `slack` of the largest count as equal to it.
    """
    # Not -inf: a score may be -inf itself, and an image may have fewer patches than steps.
    lowest = jnp.finfo(jnp.float32).min
    score = jnp.where(available, jnp.maximum(score, lowest), -jnp.inf)
    if slack:
        largest = score.max(-1, keepdims=True)
        score = jnp.where(score >= largest - slack * jnp.abs(largest), largest, score)
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def top(score: jax.Array, available: jax.Array, steps: int) -> jax.Array:
    """The patches of the largest scores [B, N] in descending order, [B, steps] int32."""
    score = jnp.where(available, score.astype(jnp.float32), -jnp.inf)
    rank = selection.descending_rank(score)
    return selection.patch_in_slot(selection.in_slot(jnp.ones_like(available), rank, steps))


def row(matrix: jax.Array, index: jax.Array) -> jax.Array:
    """Row `index` [B] of every matrix [B, N, M], [B, M]."""
    return jnp.take_along_axis(matrix, index[:, None, None], axis=1)[:, 0]


def value(vector: jax.Array, index: jax.Array) -> jax.Array:
    """Entry `index` [B] of every vector [B, N], [B, 1]."""
    return jnp.take_along_axis(vector, index[:, None], axis=1)


def farthest_points(similarity: jax.Array, available: jax.Array, steps: int) -> jax.Array:
    """Max-min distance (farthest-point sampling), the rule of DivPrune (arXiv 2503.02175).

    The first patch is the one farthest from its nearest neighbour, every further one the farthest
    from all that have been chosen.

    Args:
      similarity: [B, N, N] float32; the distance is 1 less it.
      available: [B, N] bool.
      steps: K.

    Returns:
      [B, K] int32, the order of choice.
    """
    distance = 1 - similarity
    own = jnp.eye(similarity.shape[-1], dtype=bool)
    others = jnp.where(own | ~available[:, None], jnp.inf, distance)
    first = others.min(-1)

    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        order, free, near = carry
        chosen = first_max(jnp.where(t == 0, first, near), free)
        order = order.at[:, t].set(chosen)
        free = free & ~_one_hot(chosen, free)
        return order, free, jnp.minimum(near, row(distance, chosen))

    empty = jnp.zeros((len(available), steps), jnp.int32)
    start = (empty, available, jnp.full(available.shape, jnp.inf))
    return jax.lax.fori_loop(0, steps, step, start)[0]


def coverage(
    similarity: jax.Array,
    weight: jax.Array,
    available: jax.Array,
    steps: int,
    *,
    block: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Greedy coverage (facility location): each choice raises the best similarity of all rows most.

    Args:
      similarity: [B, M, N] float32, how well patch n covers row m; at least 0.
      weight: [B, N] float32, factor of the gain of choosing patch n.
      available: [B, N] bool, patches that may be chosen.
      steps: K.
      block: patches chosen per look at all gains. Above 1, patches nearly equal to a better one of
        their block wait for a later block.

    Returns:
      The order of choice [B, K] int32, and the mean over rows of the best similarity after each
      choice, [B, K] float32.
    """

    def choose(
        t: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array], gain: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
        order, covered, free, best = carry
        chosen = first_max(gain, free, ROUNDING)
        column = jnp.take_along_axis(similarity, chosen[:, None, None], axis=2)[..., 0]
        best = jnp.maximum(best, column)
        free = free & ~_one_hot(chosen, free)
        order = order.at[:, t].set(chosen, mode="drop")
        covered = covered.at[:, t].set(best.mean(-1), mode="drop")
        return (order, covered, free, best), chosen

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple:
        best = carry[-1]
        gain = weight * jnp.maximum(similarity - best[..., None], 0).mean(1)
        lowest = jnp.finfo(jnp.float32).min
        for offset in range(block):
            carry, chosen = choose(i * block + offset, carry, gain)
            if offset + 1 < block:
                near = row(similarity, chosen) > NEAR_DUPLICATE
                gain = jnp.where(near, lowest, gain)
        return carry

    batch, rows, _ = similarity.shape
    start = (
        jnp.zeros((batch, steps), jnp.int32),
        jnp.zeros((batch, steps), jnp.float32),
        available,
        jnp.zeros((batch, rows), jnp.float32),
    )
    order, covered, _, _ = jax.lax.fori_loop(0, -(-steps // block), step, start)
    return order, covered


def soft_suppression(
    score: jax.Array, similarity: jax.Array, available: jax.Array, steps: int, gamma: float
) -> jax.Array:
    """Soft non-maximum suppression, the rule of ID-Selection (arXiv 2604.05601).

    Every choice lowers the scores of similar patches: s_i <- max(0, s_i - s_j exp(-gamma (1 -
    cos_ij)^2)).

    Args:
      score: [B, N] float32, at least 0.
      similarity: [B, N, N] float32.
      available: [B, N] bool.
      steps: K.
      gamma: how fast suppression falls off with distance.

    Returns:
      [B, K] int32, the order of choice.
    """

    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        order, free, score = carry
        chosen = first_max(score, free)
        near = jnp.exp(-gamma * (1 - row(similarity, chosen)) ** 2)
        lowered = jnp.maximum(score - value(score, chosen) * near, 0)
        return order.at[:, t].set(chosen), free & ~_one_hot(chosen, free), lowered

    empty = jnp.zeros((len(available), steps), jnp.int32)
    return jax.lax.fori_loop(0, steps, step, (empty, available, score.astype(jnp.float32)))[0]


def determinantal(kernel: jax.Array, available: jax.Array, steps: int) -> jax.Array:
    """Greedy maximum a posteriori of a determinantal point process (Chen et al., 2018).

    Args:
      kernel: [B, N, N] float32, positive semidefinite.
      available: [B, N] bool.
      steps: K; beyond the kernel's rank the rest of the order is by what rounding leaves.

    Returns:
      [B, K] int32, the order of choice.
    """
    batch, patches, _ = kernel.shape

    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple:
        order, free, gain, factors = carry
        chosen = first_max(gain, free)
        own = row(factors, chosen)
        explained = selection.einsum("bk,bnk->bn", own, factors)
        scale = jnp.sqrt(jnp.maximum(value(gain, chosen), 1e-12))
        new = (row(kernel, chosen) - explained) / scale
        factors = factors.at[:, :, t].set(new)
        return order.at[:, t].set(chosen), free & ~_one_hot(chosen, free), gain - new**2, factors

    start = (
        jnp.zeros((batch, steps), jnp.int32),
        available,
        jnp.diagonal(kernel, axis1=1, axis2=2),
        jnp.zeros((batch, patches, steps), jnp.float32),
    )
    return jax.lax.fori_loop(0, steps, step, start)[0]


def _one_hot(index: jax.Array, like: jax.Array) -> jax.Array:
    """[B, N] bool, True at `index` [B]."""
    return jnp.arange(like.shape[-1]) == index[:, None]

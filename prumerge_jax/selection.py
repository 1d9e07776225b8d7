"""Choosing and combining patches, batched and of fixed shape: ranks, quantiles, nearest, sums.

No sort and no top-k: both are slow on CPU, and on a batch that is sharded they gather it.

Axes: B batch, N patches, R capacity, D width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Selecting in less than float32 changes the number of kept tokens in most images.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def descending_rank(a: jax.Array) -> jax.Array:
    """Rank of each entry, 0 for the largest, ties to the lower index: [B, N] -> [B, N] int32."""
    n = jnp.arange(a.shape[-1])
    larger = a[:, None, :] > a[:, :, None]
    tie_before = (a[:, None, :] == a[:, :, None]) & (n[None, :] < n[:, None])
    return (larger | tie_before).sum(-1)


def quantile(a: jax.Array, rank: jax.Array, q: float) -> jax.Array:
    """NumPy's linearly interpolated quantile along N, [B, N] -> [B], from the descending rank."""
    last = a.shape[-1] - 1
    position = q * last
    low = int(position)
    share = position - low

    def value(ascending: int) -> jax.Array:
        return jnp.where(rank == last - ascending, a, 0).sum(-1)

    below, above = value(low), value(min(low + 1, last))
    if share < 0.5:  # numpy interpolates from the nearer end
        return below + (above - below) * share
    return above - (above - below) * (1 - share)


def quantile_of_largest(a: jax.Array, rank: jax.Array, count: jax.Array, q: float) -> jax.Array:
    """`quantile` of the `count` [B] largest entries of every row; 0 where count is 0."""
    position = q * (count - 1).astype(jnp.float32)
    low = jnp.floor(position).astype(jnp.int32)
    share = position - low

    def value(ascending: jax.Array) -> jax.Array:
        return jnp.where(rank == (count - 1 - ascending)[:, None], a, 0).sum(-1)

    below, above = value(low), value(jnp.minimum(low + 1, count - 1))
    from_below, from_above = below + (above - below) * share, above - (above - below) * (1 - share)
    return jnp.where(share < 0.5, from_below, from_above)


def outlier_bound(
    a: jax.Array, rank: jax.Array, factor: float, count: jax.Array | None = None
) -> jax.Array:
    """Q3 + factor * (Q3 - Q1) of every row, [B, N] -> [B], from the descending rank.

    Of the `count` [B] largest entries, where there is one.
    """
    if count is None:
        q1, q3 = (quantile(a, rank, q) for q in (0.25, 0.75))
    else:
        q1, q3 = (quantile_of_largest(a, rank, count, q) for q in (0.25, 0.75))
    return q3 + factor * (q3 - q1)


def evenly_spread(index: jax.Array, points: jax.Array, size: jax.Array | int) -> jax.Array:
    """Whether `index` is one of floor((i + 1/2) size / points) for i = 0 ... points - 1."""

    def points_up_to(i: jax.Array) -> jax.Array:
        return (2 * points * (i + 1) + size - 1) // (2 * size)

    return points_up_to(index) > points_up_to(index - 1)


def spread(
    unavailable: jax.Array,
    number: jax.Array,
    patch: jax.Array,
    available: jax.Array | None,
    *,
    kind: str,
    stride: int,
    side: int,
) -> jax.Array:
    """Patches spread over an image, [B, N] bool.

    Args:
      unavailable: [B, N] bool, patches that are selected or not present.
      number: [B] int32, selected patches.
      patch: int32 [N] or [B, N], numbers the patches that are present.
      available: [B, 1] int32, how many those are; None for all N.
      kind: see `prumerge.PruMergeConfig.added_patches`.
      stride: of `raster_fixed`.
      side: points along a side of the lattice of `lattice_fixed`.
    """
    num_patches = unavailable.shape[-1]
    count = num_patches if available is None else available
    number = number[:, None]
    if kind == "raster_fixed":
        first, end = stride // 2, count - 1
        here = (patch >= first) & (patch < end) & ((patch - first) % stride == 0)
        return jnp.broadcast_to(here, unavailable.shape)
    if kind == "raster":
        # The reference crashes at a stride of 0 (a third of all patches selected): 1 adds all.
        every = jnp.maximum(count // jnp.maximum(number, 1) // 3, 1)
        return (patch % every == 0) & (patch < count - 1) & ~unavailable
    if kind == "uniform":
        others = count - number
        return ~unavailable & evenly_spread(
            count_before(~unavailable),
            jnp.minimum(number, others),
            jnp.maximum(others, 1),
        )
    width = math.isqrt(num_patches)
    if width * width != num_patches:
        raise ValueError(f"added_patches={kind} needs a square grid; got {num_patches} patches")
    points = (jnp.arange(width) ** 2 < number).sum(-1, keepdims=True)  # ceil(sqrt(number))
    if kind == "lattice_fixed":
        points = jnp.full_like(points, side)
    place = jnp.arange(num_patches)
    on_row = evenly_spread(place // width, points, width)
    on_column = evenly_spread(place % width, points, width)
    return on_row & on_column & ~unavailable


def count_before(member: jax.Array) -> jax.Array:
    """Number of members at lower indices: [B, N] bool -> [B, N] int32."""
    return jnp.cumsum(member, axis=-1, dtype=jnp.int32) - member


def members(indices: jax.Array, num_patches: int) -> jax.Array:
    """Whether each patch is among the indices: [B, K], -1 for none -> [B, N] bool."""
    return (indices[..., None] == jnp.arange(num_patches)).any(1)


def in_slot(member: jax.Array, slot_of: jax.Array, capacity: int) -> jax.Array:
    """Whether patch n is a member and has slot r: [B, N] bool, [B, N] -> [B, R, N] bool."""
    return member[:, None] & (slot_of[:, None] == jnp.arange(capacity)[:, None])


def patch_in_slot(is_in_slot: jax.Array) -> jax.Array:
    """Patch of every slot, -1 for an empty one: [B, R, N] bool -> [B, R] int32."""
    patches = jnp.where(is_in_slot, jnp.arange(is_in_slot.shape[-1]), 0).sum(-1)
    return jnp.where(is_in_slot.any(-1), patches, -1).astype(jnp.int32)


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` [B, R] of x [B, N, D]; row 0 where the index is -1."""
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)


def weighted_sum(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    """[B, R, N] float32 x [B, N, D] -> [B, R, D] float32.

    Values, unlike the choice of patches, may be multiplied in the precision they come in.
    """
    if hidden.dtype == jnp.float32:
        return einsum("brn,bnd->brd", weights, hidden)
    return jnp.einsum(
        "brn,bnd->brd", weights.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32
    )


def unit_rows(x: jax.Array, least: float = 1e-12) -> jax.Array:
    """[..., D] -> float32 rows of length 1; those shorter than `least` are divided by it."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), least)


def copies_among_largest(x: jax.Array, available: jax.Array, k: int) -> jax.Array:
    """Number of copies of each entry among the k largest along the last axis.

    Bisection on order-preserving integers instead of a sort.

    Args:
      x: [..., N] float32.
      available: [..., N] int32, copies of each entry.
      k: copies to take; ties go to the lower index.

    Returns:
      [..., N] int32, at most `available`; all of it where fewer than k copies exist.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def count(member: jax.Array) -> jax.Array:
        return jnp.where(member, available, 0).sum(-1, keepdims=True)

    def narrow(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        enough = count(bits >= middle) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.full((*x.shape[:-1], 1), np.iinfo(np.int32).min, jnp.int32)
    threshold, _ = jax.lax.fori_loop(0, 32, narrow, (low, jnp.full_like(low, 2**31 - 1)))
    above, tied = bits > threshold, bits == threshold
    room = k - count(above)

    # Of the entries at the threshold, as many as there is room for, lowest index first: bisect
    # for the first index at which the room is used up.
    index = jnp.arange(x.shape[-1])

    def narrow_index(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        enough = count(tied & (index <= middle)) >= room
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    first = jnp.zeros_like(room)
    steps = math.ceil(math.log2(x.shape[-1])) + 1
    cut, _ = jax.lax.fori_loop(
        0, steps, narrow_index, (first, jnp.full_like(first, x.shape[-1] - 1))
    )
    before = tied & (index < cut)
    at_cut = jnp.where(tied & (index == cut), jnp.minimum(available, room - count(before)), 0)
    return jnp.where(above | before, available, at_cut)

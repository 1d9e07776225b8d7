"""Choices that end in groups: VisionZip's contextual tokens, HoloV's crops, PACT's clusters.

Each function follows its paper's steps for every image of a batch on its own, with one shape.

Axes: B batch, N patches, H heads, D width, K tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.reductions import greedy


def raster(mask: jax.Array, slots: int) -> jax.Array:
    """Indices of the True entries of [B, N], ascending, -1 beyond the last: [B, slots] int32."""
    return selection.patch_in_slot(selection.in_slot(mask, selection.count_before(mask), slots))


class Contextual(NamedTuple):
    """VisionZip's division of an image.

    Attributes:
      dominant: [B, dominant] int32, patches kept as they are, in raster order.
      targets: [B, contextual] int32, patches that take in the others, in raster order.
      weights: [B, contextual, N] float32, share of every patch in a contextual token.
    """

    dominant: jax.Array
    targets: jax.Array
    weights: jax.Array


def contextual(attention: jax.Array, metric: jax.Array, dominant: int, tokens: int) -> Contextual:
    """VisionZip (arXiv 2412.04467), steps 1 to 4.

    Args:
      attention: [B, N] float32, the CLS row summed or averaged over heads.
      metric: [B, N, D], what similarity is measured on: keys averaged over heads.
      dominant: patches of the largest attention that are kept.
      tokens: contextual tokens; targets are every floor((N - dominant) / tokens)-th of the rest,
        and a token is its target plus the mean of the patches most similar to it.
    """
    patches = attention.shape[-1]
    everywhere = jnp.ones(attention.shape, bool)
    kept = selection.members(greedy.top(attention, everywhere, dominant), patches)
    place = jnp.cumsum(~kept, axis=-1) - 1
    stride = max(1, (patches - dominant) // tokens)
    is_target = ~kept & (place % stride == 0) & (place // stride < tokens)
    targets = raster(is_target, tokens)
    similarity = greedy.cosines(metric)
    to_target = jnp.take_along_axis(similarity, jnp.maximum(targets, 0)[:, None], axis=2)
    to_target = jnp.where((targets >= 0)[:, None], to_target, -jnp.inf)
    group = jnp.argmax(to_target, axis=-1)
    joins = (group[:, None] == jnp.arange(tokens)[:, None]) & ~(kept | is_target)[:, None]
    size = joins.sum(-1, keepdims=True)
    own = targets[..., None] == jnp.arange(patches)
    return Contextual(raster(kept, dominant), targets, own + joins / jnp.maximum(size, 1))


def crop_shares(
    features: jax.Array, attention: jax.Array, *, crops: int, tokens: int, alpha: float
) -> jax.Array:
    """HoloV (arXiv 2510.02912): tokens shared out over raster runs, the most attended of each kept.

    Where a crop is smaller than its share, the surplus goes to the next crops (the authors' code
    emits zero tokens instead).

    Args:
      features: [B, N, D] in the decoder's space.
      attention: [B, N] float32.
      crops: raster runs of floor(N / crops) patches, one more in the first N mod crops.
      tokens: kept in all.
      alpha: weight of the variance of similarity beside attention.

    Returns:
      [B, N] bool, the patches kept.
    """
    patches = attention.shape[-1]
    crop_of, sizes = _runs(patches, crops)
    member = crop_of == jnp.arange(crops)[:, None]
    unit = features.astype(jnp.float32)
    unit = unit / (jnp.linalg.norm(unit, axis=-1, keepdims=True) + 1e-6)
    together = (crop_of[:, None] == crop_of) & ~jnp.eye(patches, dtype=bool)
    similarity = jnp.where(together, selection.einsum("bnd,bmd->bnm", unit, unit), 0)
    others = jnp.maximum(sizes[crop_of] - 1, 1)
    mean = similarity.sum(-1) / others
    # The zeroed diagonal counts among the deviations, as in the authors' code.
    same_crop = crop_of[:, None] == crop_of
    deviation = jnp.where(same_crop, similarity - mean[..., None], 0)
    variance = (deviation**2).sum(-1) / others
    scaled = 1000 * attention.astype(jnp.float32)

    def crop_mean(x: jax.Array) -> jax.Array:
        return jnp.where(member, x[:, None], 0).sum(-1) / sizes

    ratio = crop_mean(jnp.abs(scaled)) / (crop_mean(jnp.abs(variance)) + 1e-6)
    score = crop_mean(scaled + alpha * variance * ratio[:, crop_of])
    share = tokens * score / (score.sum(-1, keepdims=True) + 1e-6)
    count = jnp.floor(share).astype(jnp.int32)
    rank = selection.descending_rank(score)
    count = count + (rank < (tokens - count.sum(-1, keepdims=True)))
    count = _spill(count, sizes)
    order = _rank_within(scaled, crop_of)
    return order < jnp.take_along_axis(count, crop_of[None].repeat(len(count), 0), axis=1)


def _runs(patches: int, crops: int) -> tuple[jax.Array, jax.Array]:
    sizes = [patches // crops + (crop < patches % crops) for crop in range(crops)]
    return jnp.repeat(jnp.arange(crops), jnp.array(sizes), total_repeat_length=patches), jnp.array(
        sizes
    )


def _rank_within(score: jax.Array, group: jax.Array) -> jax.Array:
    """Place of every entry among those of its own group, by descending score."""
    index = jnp.arange(score.shape[-1])
    better = (score[:, None] > score[..., None]) | (
        (score[:, None] == score[..., None]) & (index < index[:, None])
    )
    return (better & (group[:, None] == group)).sum(-1)


def _spill(count: jax.Array, sizes: jax.Array) -> jax.Array:
    """Counts with what a group cannot hold given to the groups after it, around the end."""

    def pass_on(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count, surplus = carry
        crop = i % len(sizes)
        wanted = count[:, crop] + surplus
        held = jnp.minimum(wanted, sizes[crop])
        return count.at[:, crop].set(held), wanted - held

    start = (count, jnp.zeros(len(count), count.dtype))
    return jax.lax.fori_loop(0, 2 * len(sizes), pass_on, start)[0]


class Clusters(NamedTuple):
    """Groups of patches around centres.

    Attributes:
      centre: [B, N] int32, the patch at the centre of each patch's group.
      is_centre: [B, N] bool.
    """

    centre: jax.Array
    is_centre: jax.Array


def density_peaks(keys: jax.Array, present: jax.Array, cutoff: float) -> Clusters:
    """PACT's distance-bounded clustering (arXiv 2504.08966, DBDPC).

    Patches are visited by descending density; one farther than `cutoff` from every centre so far
    becomes a centre. Every patch then joins its nearest centre.

    Args:
      keys: [B, N, D]; the distance is 1 less their cosine.
      present: [B, N] bool, patches that take part.
      cutoff: the most that a patch is away from its centre.
    """
    distance = 1 - greedy.cosines(keys)
    near = jnp.where(present[:, None], jnp.exp(-((distance / 2) ** 2)), 0)
    order = greedy.top(near.sum(-1), present, keys.shape[1])

    def visit(i: jax.Array, centres: jax.Array) -> jax.Array:
        patch = order[:, i]
        nearest = jnp.where(centres, greedy.row(distance, patch), jnp.inf).min(-1)
        joins = (nearest > cutoff) & jnp.take_along_axis(present, patch[:, None], axis=1)[:, 0]
        return centres | (joins[:, None] & (jnp.arange(centres.shape[-1]) == patch[:, None]))

    centres = jax.lax.fori_loop(0, keys.shape[1], visit, jnp.zeros(present.shape, bool))
    to_centre = jnp.where(centres[:, None], distance, jnp.inf)
    return Clusters(jnp.argmin(to_centre, axis=-1).astype(jnp.int32), centres)


def text_and_patch_rows(
    projected: jax.Array,
    hidden: jax.Array,
    question: jax.Array,
    asked: jax.Array,
    *,
    alpha: float,
    text_temperature: float,
    vision_temperature: float,
) -> jax.Array:
    """What MMTok (arXiv 2508.18264) covers: the question's tokens and the image's own patches.

    Args:
      projected: [B, N, Dt], patches in the decoder's space.
      hidden: [B, N, D], patch features.
      question: [B, M, Dt], embeddings of the question's tokens.
      asked: [B, M] bool, tokens that are there.
      alpha: weight of the patches' half.
      text_temperature, vision_temperature: of the softmax over patches.

    Returns:
      [B, M + N, N] float32; rows of tokens that are not there are 0.
    """
    number = jnp.maximum(asked.sum(-1), 1)[:, None, None]
    of_text = jax.nn.softmax(greedy.cosines(question, projected) / text_temperature, axis=-1)
    of_text = jnp.where(asked[..., None], of_text, 0) / number
    of_patches = jax.nn.softmax(greedy.cosines(hidden) / vision_temperature, axis=-1)
    return jnp.concatenate([of_text, alpha * of_patches / hidden.shape[1]], axis=1)

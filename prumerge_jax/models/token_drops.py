"""Tokens that leave the decoder's layers, as far as answers can tell.

Every token is computed in every layer; a dropped one is hidden from the others by a bias on its
key, which the cache keeps with the key, so that tokens generated later do not see it either. What a
method gains in time is therefore not gained here.

Axes: B rows, T their length, H heads, K key heads, Dh their width, D width of the decoder.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.models.attention.masks import causal_mask, segment_mask
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.decoder_layer import KV, DecoderLayer, PackedRows
from prumerge_jax.models.rotary import rotation
from prumerge_jax.reductions.drops import RECYCLED, ROUNDING, Drops

HIDDEN = -4000.0
"""Bias of a dropped key: its weight is 0 in float32, and its columns are finite in float16."""


class DropPlan(NamedTuple):
    """What leaves packed rows, and who asks.

    Attributes:
      drops: the schedule.
      may_leave: [B, T] bool, the tokens that may.
      asking: [B, T] int32, the column of the last token of the prompt that a token belongs to; -1
        for padding.
    """

    drops: Drops
    may_leave: jax.Array
    asking: jax.Array


def plan_of(
    drops: Drops | None, visual_index: jax.Array, asking: jax.Array | None
) -> DropPlan | None:
    """The plan of rows, `visual_index` as in `LlavaModel.embed_rows`; None without drops."""
    if drops is None or asking is None:
        return None
    index = visual_index if visual_index.ndim == 2 else visual_index[..., 0]
    if drops.of == "visual":
        return DropPlan(drops, index >= 0, asking)
    return DropPlan(drops, (index == -1) & (jnp.arange(index.shape[1]) < asking), asking)


@dataclasses.dataclass(frozen=True, eq=False)
class DroppingRows:
    """Packed rows whose tokens leave; no segment has branches.

    Attributes:
      plan: what leaves.
      config: sizes of the decoder.
      rows: the rows before the first layer.
      positions: [B, T] int32.
      raters: [B, T] float32, how much the attention of each token counts.
    """

    plan: DropPlan
    config: TextConfig
    rows: PackedRows
    positions: jax.Array
    raters: jax.Array

    @classmethod
    def before_layers(
        cls,
        x: jax.Array,
        plan: DropPlan,
        config: TextConfig,
        rows: PackedRows,
        positions: jax.Array,
    ) -> "DroppingRows":
        """The rows as they enter the decoder, with embeddings x [B, T, D]."""
        raters = (jnp.arange(x.shape[1]) == plan.asking).astype(jnp.float32)
        if plan.drops.raters == "text":
            raters = text_raters(x, rows.segment_ids, plan.may_leave, plan.asking)
        return cls(plan, config, rows, positions, raters)

    def everything(self) -> jax.Array:
        """The tokens that the first layer sees, [B, T] bool: all."""
        return jnp.ones(self.plan.may_leave.shape, bool)

    def rows_of(self, kept: jax.Array) -> PackedRows:
        """What attention needs where kept [B, T] are left."""
        bias = jnp.where(kept, 0.0, HIDDEN)
        positions = self.positions
        if self.plan.drops.renumbered:
            # Only differences of positions count: instead of the text, which later tokens follow,
            # what stands in front of a gap moves.
            gone = jnp.cumsum(~kept, axis=1)
            last = jnp.maximum(self.plan.asking, 0)
            behind = jnp.take_along_axis(gone, last, axis=1) - gone
            positions = positions + jnp.maximum(behind, 0)
        return dataclasses.replace(
            self.rows, rotation=rotation(positions, self.config), key_bias=bias
        )

    def attend(
        self, layer: DecoderLayer, index: jax.Array | int, x: jax.Array, kept: jax.Array
    ) -> tuple[jax.Array, jax.Array, KV, jax.Array]:
        """One layer's attention, and what leaves in front of it or behind it.

        Args:
          layer: the layer.
          index: its number.
          x: [B, T, D], its input.
          kept: [B, T] bool, tokens that are left.

        Returns:
          Its input, other where tokens are recycled; what its attention gives; its keys and values,
          as in `DecoderLayer.attend`; and the tokens that are left.
        """
        coming = self.plan.drops.ranked_by == "coming"
        if coming:
            x, kept = self._drop(layer, index, x, kept)
        attended, kv = layer.attend(layer.qkv_projections(x), self.rows_of(kept))
        if not coming:
            x, kept = self._drop(layer, index + 1, x, kept)
        return x, attended, kv, kept

    def _drop(
        self, layer: DecoderLayer, index: jax.Array | int, x: jax.Array, kept: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x and the tokens left from layer `index` on, once `layer` has ranked them, if any leave
        there."""
        shares = jnp.asarray(self.plan.drops.share_from(self.config.num_layers))
        share = shares[index]

        def dropped() -> tuple[jax.Array, jax.Array]:
            projected = layer.qkv_projections(x)
            heads = layer.split_and_rotate(projected, self.rows_of(kept).rotation)
            score = attention_of(heads.q, heads.k, self.raters, self._seen(kept))
            left = self._most_attended(score, kept, share)
            if self.plan.drops.recycled:
                return self._recycle(x, score, kept, left)
            return x, left

        return jax.lax.cond(share < 1, dropped, lambda: (x, kept))

    def _same(self) -> jax.Array:
        return same_segment(self.rows.segment_ids)

    def _seen(self, kept: jax.Array) -> jax.Array:
        """Which key a query sees, [B, T, T] bool."""
        return self._same() & kept[:, None] & causal_mask(kept.shape[1])

    def _most_attended(self, score: jax.Array, kept: jax.Array, share: jax.Array) -> jax.Array:
        """The tokens [B, T] that are left: of those that may leave, in each segment as many as the
        share says, those of the highest score [B, T]; and all others."""
        eligible = self.plan.may_leave & kept
        total = (self._same() & self.plan.may_leave[:, None]).sum(-1)
        count = jnp.floor(total * share + ROUNDING).astype(jnp.int32)
        return kept & (~self.plan.may_leave | (self._rank(score, eligible) < count))

    def _rank(self, score: jax.Array, among: jax.Array) -> jax.Array:
        """Rank of every token by descending score among those of its segment, [B, T] int32."""
        at = jnp.arange(score.shape[1])
        mine, other = score[:, :, None], score[:, None]
        before = (other > mine) | ((other == mine) & (at[None] < at[:, None]))
        return (before & self._same() & among[:, None]).sum(-1)

    def _recycle(
        self, x: jax.Array, score: jax.Array, before: jax.Array, left: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """SparseVLM's recycling: the best of the dropped tokens, as means of clusters.

        Args:
          x: [B, T, D].
          score: [B, T], what ranked them.
          before, left: [B, T] bool, the tokens before and after the drop.

        Returns:
          x with the means in the places of the clusters' centres, and the tokens left with these.
        """
        same, gone = self._same(), before & ~left
        number = (same & gone[:, None]).sum(-1)
        share, size = RECYCLED
        best = gone & (self._rank(score, gone) < number * share // 10)
        number = (same & best[:, None]).sum(-1)
        clusters = -(-number // size)
        pair = same & best[:, None] & best[:, :, None]
        x32 = x.astype(jnp.float32)
        distance = jnp.where(pair, distances(x32), jnp.inf) / x.shape[-1] ** 0.5
        centre = self._centres(distance, pair, best, clusters)
        home = jnp.argmin(jnp.where(centre[:, None], distance, jnp.inf), axis=-1)
        home = jnp.where(centre, jnp.arange(x.shape[1]), home)
        member = best[:, None] & (home[:, None] == jnp.arange(x.shape[1])[:, None])
        means = selection.einsum("bct,btd->bcd", member.astype(jnp.float32), x32)
        means = means / jnp.maximum(member.sum(-1, keepdims=True), 1)
        return jnp.where(centre[..., None], means.astype(x.dtype), x), left | centre

    def _centres(
        self, distance: jax.Array, pair: jax.Array, best: jax.Array, clusters: jax.Array
    ) -> jax.Array:
        """Density peaks of `clusters` [B, T] neighbours each (DPC-KNN), [B, T] bool."""
        order = jnp.sort(distance, axis=-1)
        near = jnp.arange(distance.shape[-1]) < clusters[..., None]
        squares = jnp.where(near & jnp.isfinite(order), order, 0) ** 2
        density = jnp.exp(-squares.sum(-1) / jnp.maximum(clusters, 1))
        farthest = jnp.where(pair, distance, 0).max(-1)
        widest = jnp.where(self._same(), farthest[:, None], 0).max(-1)
        denser = pair & (density[:, None] > density[:, :, None])
        gap = jnp.minimum(jnp.where(denser, distance, jnp.inf).min(-1), widest)
        return best & (self._rank(gap * density, best) < clusters)


def same_segment(segment_ids: jax.Array) -> jax.Array:
    """Which tokens are of one segment, [B, T, T] bool; none is padding."""
    same = segment_mask(segment_ids)
    assert same is not None
    return same[:, 0] & (segment_ids > 0)[:, None]


def distances(x: jax.Array) -> jax.Array:
    """Euclidean distances of the rows of x [B, T, D] float32, [B, T, T]; 0 from a row to itself."""
    squares = (x * x).sum(-1)
    products = selection.einsum("btd,bsd->bts", x, x)
    between = jnp.sqrt(jnp.maximum(squares[:, :, None] + squares[:, None] - 2 * products, 0))
    # Rounding would leave something there, which decides where one neighbour is a row's density.
    return jnp.where(jnp.eye(x.shape[1], dtype=bool), 0, between)


def attention_of(q: jax.Array, k: jax.Array, raters: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention that every key gets from the raters, mean over heads, [B, T] float32.

    Args:
      q, k: [B, T, H, Dh] and [B, T, K, Dh], rotated.
      raters: [B, T] float32, weights of the queries.
      seen: [B, T, T] bool, which key a query sees.
    """
    groups = q.shape[2] // k.shape[2]

    def one(total: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, k = head
        logits = selection.einsum("btd,bsd->bts", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1, where=seen)
        weights = jnp.where(seen, weights, 0)
        return total + selection.einsum("bt,bts->bs", raters, weights), None

    heads = (
        jnp.moveaxis(q, 2, 0).astype(jnp.float32),
        jnp.repeat(jnp.moveaxis(k, 2, 0), groups, axis=0).astype(jnp.float32),
    )
    total, _ = jax.lax.scan(one, jnp.zeros(raters.shape, jnp.float32), heads)
    return total / q.shape[2]


def text_raters(
    x: jax.Array, segment_ids: jax.Array, visual: jax.Array, asking: jax.Array
) -> jax.Array:
    """SparseVLM's raters: the words behind an image that its tokens resemble more than the others.

    Args:
      x: [B, T, D], embeddings before the first layer.
      segment_ids: [B, T] int32.
      visual: [B, T] bool.
      asking: [B, T] int32, see `DroppingRows`.

    Returns:
      [B, T] float32, equal weights that sum to 1 in every segment that has images.
    """
    at = jnp.arange(x.shape[1])
    same = same_segment(segment_ids)
    last_visual = jnp.where(same & visual[:, None], at, -1).max(-1)
    is_word = (at > last_visual) & (at <= asking) & (last_visual >= 0)
    x = x.astype(jnp.float32)
    shown = same & is_word[:, None]
    logits = jnp.where(shown, selection.einsum("btd,bsd->bts", x, x), -jnp.inf)
    resembles = jax.nn.softmax(logits, axis=-1, where=shown)
    # Of a word: the mean over the visual tokens of its segment.
    by_image = same & visual[:, None]
    number = jnp.maximum(by_image.sum(-1), 1)
    of_word = jnp.where(by_image, resembles.swapaxes(1, 2), 0).sum(-1) / number
    words = jnp.maximum(shown.sum(-1), 1)
    mean = jnp.where(shown, of_word[:, None], 0).sum(-1) / words
    rates = is_word & (of_word > mean)
    # All words alike, as where there is one alone: the last token rates.
    last = is_word & (at == asking)
    rates = jnp.where((same & rates[:, None]).any(-1), rates, last)
    return rates / jnp.maximum((same & rates[:, None]).sum(-1), 1)

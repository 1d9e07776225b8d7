"""PruMerge: adaptive reduction of visual tokens (arXiv 2403.15388), batched and of fixed shape.

The steps of the method, one function each:

1. `cls_attention`: how much the CLS token attends to every patch.
2. `select`: patches whose attention is an outlier are kept (section 3.2 of the paper), PruMerge+
   adds patches spread over the image (section 3.4).
3. `merge`: every kept patch takes in its most similar neighbours (section 3.3); one extra token
   sums up what was pruned.

Shapes are static. An image keeps as many tokens as it needs, up to the capacity R; `lengths` says
how many, and `required` says how many it would have needed. Images never see each other, so the
batch may be sharded freely.

Axes: B batch, N patches, R capacity, D width of the vision tower.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax import options, selection
from prumerge_jax.options import Bounds

MOST = 2**16
"""Greatest number of tokens that an option may name; no vision tower has as many patches."""


@dataclasses.dataclass(frozen=True)
class PruMergeConfig:
    """What is kept, what is added, how the rest is merged. See `preset` for published settings.

    Attributes:
      count_rule: `iqr` keeps attention outliers, `top` the floor(N * ratio) most attended patches,
        `all` every patch.
      iqr_factor: outliers are above Q3 + iqr_factor * (Q3 - Q1).
      ratio: share of patches that `top` keeps, and that `raster_fixed` and `lattice_fixed` add.
      min_tokens, max_tokens: bounds on the number of selected patches; None means unbounded.
      added_patches: patches added to the selected ones: `none`; `raster` every k-th patch with k
        derived from the number selected, as the reference's adaptive branch; `raster_fixed` every
        floor(1 / ratio)-th, selected ones doubled, as its training branch; `uniform` as many as
        were selected, evenly spread over the others, as the paper; `lattice` evenly spread in two
        dimensions; `lattice_fixed` the same, but the share `ratio` of all patches whatever was
        selected, for towers of few patches, where the stride of `raster` is 1.
      merge: `sum` adds attention-weighted neighbours to a token; `mean` takes the
        attention-weighted average of the token and its neighbours; `none`.
      neighbours: number of neighbours that a token takes in.
      similarity: similarity measure of keys, `cosine` or `dot`.
      pool: neighbours come from `all` other patches or only from the `pruned` ones.
      extra_token: whether to append the attention-weighted sum of the pruned patches.
      order: tokens by descending `attention` followed by the added ones, or in `raster` order.
      capacity: R; None means the most that N patches can need.

    Raises:
      ValueError: a value that is not allowed.
    """

    count_rule: Literal["iqr", "top", "all"] = "iqr"
    iqr_factor: Annotated[float, Bounds(0, 1000)] = 1.5
    ratio: Annotated[float, Bounds(0.001, 1)] = 0.125
    min_tokens: Annotated[int, Bounds(0, MOST)] = 1
    max_tokens: Annotated[int, Bounds(1, MOST)] | None = None
    added_patches: Literal[
        "none", "raster", "raster_fixed", "uniform", "lattice", "lattice_fixed"
    ] = "none"
    merge: Literal["sum", "mean", "none"] = "sum"
    neighbours: Annotated[int, Bounds(1, MOST)] = 32
    similarity: Literal["cosine", "dot"] = "cosine"
    pool: Literal["all", "pruned"] = "all"
    extra_token: bool = True
    order: Literal["attention", "raster"] = "attention"
    capacity: Annotated[int, Bounds(1, MOST)] | None = None

    def __post_init__(self) -> None:
        options.check(self)
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; expected at least min_tokens, {self.min_tokens}"
            )

    def capacity_for(self, num_patches: int) -> int:
        """R: the capacity that was asked for, or else the most tokens an image can need."""
        if self.capacity is not None:
            return self.capacity
        if self.count_rule == "all":
            return num_patches
        is_fixed = self.count_rule == "top"
        most = self.fixed_count(num_patches) if is_fixed else self.most_outliers(num_patches)
        most = max(self.min_tokens, most)
        if self.max_tokens is not None:
            most = min(most, self.max_tokens)
        most = {
            "none": most,
            "raster": num_patches,
            "raster_fixed": most + num_patches // self.stride,
            "uniform": min(2 * most, num_patches),
            "lattice": num_patches,
            "lattice_fixed": most + self.lattice_side(num_patches) ** 2,
        }[self.added_patches]
        return most + self.extra_token

    def most_outliers(self, num_patches: int) -> int:
        """Upper bound of the number of patches that the count rule `iqr` keeps."""
        return num_patches // 4  # of all values can be above the third quartile

    def fixed_count(self, num_patches: int) -> int:
        """Number of patches that the count rule `top` keeps."""
        return int(num_patches * self.ratio)

    def lattice_side(self, num_patches: int) -> int:
        """Points along a side of the lattice of `lattice_fixed`."""
        return max(round(math.sqrt(num_patches * self.ratio)), 1)

    @property
    def stride(self) -> int:
        """Stride of `raster_fixed`."""
        return int(1 / self.ratio)


_PAPER: dict[str, Any] = {"merge": "mean", "similarity": "dot", "pool": "pruned"}
_NO_MERGE: dict[str, Any] = {"merge": "none", "extra_token": False}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "prumerge": {},
    "prumerge+": {"added_patches": "raster"},
    "prumerge-fixed": {"count_rule": "top"},
    "prumerge+fixed": {"count_rule": "top", "added_patches": "raster_fixed"},
    "paper": _PAPER,
    "paper+": _PAPER | {"added_patches": "uniform"},
    "select-only": _NO_MERGE,
    "full": _NO_MERGE | {"count_rule": "all", "order": "raster"},
}
"""Published settings: the fields of `PruMergeConfig` that each sets."""


def preset(name: str, **overrides: Any) -> PruMergeConfig:
    """A published setting, with single parameters overridden by keyword.

    `prumerge` and `prumerge+` are the reference code at batch size 1, `prumerge-fixed` and
    `prumerge+fixed` its training branch, `paper` and `paper+` the text of the paper, `select-only`
    the paper's AITS ablation, `full` plain LLaVA.

    Raises:
      ValueError: a name, an override or a value that does not exist.
    """
    if name not in PRESETS:
        raise ValueError(options.unknown("unknown reduction", name, PRESETS))
    return options.make(PruMergeConfig, {**PRESETS[name], **overrides})


class VisualTokens(NamedTuple):
    """The visual tokens of a batch of images; the valid ones come first.

    Attributes:
      tokens: [B, R, D] in the dtype of the input; exactly zero beyond `lengths`. See also
        `reductions.Reduction.weighs_tokens`.
      lengths: [B] int32, valid tokens, the extra token included, at most R. 0 for an image whose
        attention was not finite.
      patch_indices: [B, R] int32, the patch a token stands for; -1 for the extra token and padding.
      required: [B] int32, tokens needed before the cap: above R, the tokens were cut and the image
        must be run again with more capacity. -1 for an image whose attention was not finite.
      content: [B, N] float32, see `reductions.Reduction.crop_shares`; None where crops share
        nothing.
    """

    tokens: jax.Array
    lengths: jax.Array
    patch_indices: jax.Array
    required: jax.Array
    content: jax.Array | None = None


class Tubes(NamedTuple):
    """What is known of frames [B] whose patches stand for later ones too.

    Attributes:
      bound: [B] float32, above which the merged attention of a patch is an outlier.
      whole: [B] bool, whether no patch is merged into an earlier frame's.
    """

    bound: jax.Array
    whole: jax.Array


class Selection(NamedTuple):
    """Which patches are kept, and in which slot.

    Attributes:
      patch_indices: [B, R] int32, -1 beyond the last kept patch.
      kept: [B] int32, kept entries before the cap; -1 where attention was not finite.
      copies: [B, N] int32, how often a patch is among the entries.
      pruned: [B, N] bool, patches outside. A doubled entry makes the pruned patch of lowest index
        vanish from here too, as the reference's index complement does.
    """

    patch_indices: jax.Array
    kept: jax.Array
    copies: jax.Array
    pruned: jax.Array


def cls_attention(query_cls: jax.Array, keys: jax.Array) -> jax.Array:
    """Attention of CLS to the patches, through one head as wide as the tower.

    Not the tower's attention: queries and keys of all heads are concatenated, and the scale is
    D^-0.5 for the full width D (clip_encoder.py of the reference).

    Args:
      query_cls: [B, D], CLS query of the last block, bias included.
      keys: [B, N+1, D], keys of the last block, CLS first.

    Returns:
      [B, N] float32: a softmax over N+1 entries without its first; it sums to less than 1.
    """
    query_cls, keys = query_cls.astype(jnp.float32), keys.astype(jnp.float32)
    logits = selection.einsum("bd,bnd->bn", query_cls, keys) * query_cls.shape[-1] ** -0.5
    return jax.nn.softmax(logits, axis=-1)[:, 1:]


def reduce_tokens(
    hidden: jax.Array,
    keys: jax.Array,
    attention: jax.Array,
    config: PruMergeConfig,
    present: jax.Array | None = None,
    tubes: Tubes | None = None,
) -> VisualTokens:
    """Selects and merges the visual tokens of every image independently.

    Args:
      hidden: [B, N, D], patch features.
      keys: [B, N, D], keys of the last block, without CLS.
      attention: [B, N] float32 from `cls_attention`.
      config: the method's parameters; static under `jax.jit`.
      present: [B, N] bool, patches that may be seen; the others are neither counted nor kept nor
        merged. An image without any has no token. None means all.
      tubes: of frames that were merged with the ones after them, whose other patches are not
        `present`; None for images.

    Returns:
      `VisualTokens` of capacity R = `config.capacity_for(N)`.
    """
    chosen = select(attention, config, present, tubes)
    tokens = selection.rows(hidden, chosen.patch_indices).astype(jnp.float32)
    if config.merge != "none":
        tokens = merge(tokens, hidden, keys, attention, chosen, config)
    slot = jnp.arange(tokens.shape[1])
    valid = slot < chosen.kept[:, None]
    tokens = jnp.where(valid[..., None], tokens, 0)
    required = chosen.kept
    if config.extra_token:
        # Its weights fill one row of a [1, N] x [N, D] product.
        weights = jnp.where(chosen.pruned, attention, 0)[:, None]
        extra = selection.weighted_sum(weights, hidden)
        here = (slot == chosen.kept[:, None])[..., None]
        tokens = jnp.where(here, extra, tokens)
        without = required < 0 if present is None else (required < 0) | ~present.any(-1)
        if tubes is not None:
            without |= ~tubes.whole & ~chosen.pruned.any(-1)
        required = jnp.where(without, required, required + 1)
    return VisualTokens(
        tokens=tokens.astype(hidden.dtype),
        lengths=jnp.clip(required, 0, tokens.shape[1]),
        patch_indices=chosen.patch_indices,
        required=required,
    )


def select(
    attention: jax.Array,
    config: PruMergeConfig,
    present: jax.Array | None = None,
    tubes: Tubes | None = None,
) -> Selection:
    """Chooses the patches to keep, from attention [B, N] alone; of those `present` [B, N]."""
    attention = attention.astype(jnp.float32)
    num_patches = attention.shape[-1]
    finite = jnp.isfinite(attention).all(axis=-1)
    attention = jnp.where(finite[:, None], attention, 0)  # keeps NaN out of the integers below
    if present is not None:
        attention = jnp.where(present, attention, -jnp.inf)  # last in every order

    rank = selection.descending_rank(attention)
    number = _number_selected(attention, rank, config, present, tubes)
    selected = rank < number[:, None]
    added = _added(selected, number, config, present)

    if config.order == "attention":
        selected_slot = rank
        added_slot = number[:, None] + selection.count_before(added)
    else:
        selected_slot = selection.count_before(selected) + selection.count_before(added)
        added_slot = selected_slot + selected
    capacity = config.capacity_for(num_patches)
    in_slot = selection.in_slot(selected, selected_slot, capacity)
    in_slot |= selection.in_slot(added, added_slot, capacity)

    outside = ~(selected | added)
    if present is not None:
        outside &= present
    doubled = (selected & added).sum(-1, keepdims=True)
    kept = selected.sum(-1) + added.sum(-1)
    return Selection(
        patch_indices=selection.patch_in_slot(in_slot & finite[:, None, None]),
        kept=jnp.where(finite, kept, -1).astype(jnp.int32),
        copies=selected.astype(jnp.int32) + added.astype(jnp.int32),
        pruned=outside & (selection.count_before(outside) >= doubled),
    )


def merge(
    tokens: jax.Array,
    hidden: jax.Array,
    keys: jax.Array,
    attention: jax.Array,
    chosen: Selection,
    config: PruMergeConfig,
) -> jax.Array:
    """Adds to every kept token its attention-weighted nearest neighbours, themselves unmerged.

    Args:
      tokens: [B, R, D] float32, the kept rows of `hidden`.
      hidden, keys: [B, N, D].
      attention: [B, N] float32.
      chosen: from `select`.
      config: the method's parameters.

    Returns:
      [B, R, D] float32.
    """
    weights = nearest(keys, chosen, config) * attention[:, None]
    neighbours = selection.weighted_sum(weights, hidden)
    if config.merge == "sum":
        return tokens + neighbours
    own = selection.rows(attention[..., None], chosen.patch_indices)
    total = own + weights.sum(-1, keepdims=True)
    return jnp.where(total > 0, (own * tokens + neighbours) / total, tokens)


def nearest(keys: jax.Array, chosen: Selection, config: PruMergeConfig) -> jax.Array:
    """The neighbours that every kept token takes in.

    Ties go to the lower patch index. An image with fewer other patches than `config.neighbours`
    gives all of them.

    Returns:
      [B, R, N] int32: how many copies of patch n are among the neighbours of the token in slot r
      (more than 1 only where a patch is kept twice). Meaningless beyond the last token.
    """
    keys = comparable(keys, config)
    kept = selection.rows(keys, chosen.patch_indices)
    if config.similarity == "cosine":
        # Unit keys share a large common part. Taken off one side, it shifts all similarities of a
        # token alike and leaves several times less rounding to decide between neighbours.
        keys = keys - keys.mean(axis=1, keepdims=True)
    similarity = selection.einsum("brd,bnd->brn", kept, keys)
    available = chosen.pruned.astype(jnp.int32)
    if config.pool == "all":
        available = available + chosen.copies
    own = chosen.patch_indices[..., None] == jnp.arange(keys.shape[1])
    available = jnp.where(own, available[:, None] - (config.pool == "all"), available[:, None])
    return selection.copies_among_largest(similarity, available, config.neighbours)


def comparable(keys: jax.Array, config: PruMergeConfig) -> jax.Array:
    """Keys [B, N, D] whose inner products are the similarity: for `cosine` of length 1."""
    return selection.unit_rows(keys) if config.similarity == "cosine" else keys.astype(jnp.float32)


def number_of_outliers(
    attention: jax.Array, iqr_factor: float = 1.5, present: jax.Array | None = None
) -> jax.Array:
    """Number of patches whose attention [B, N] exceeds Q3 + iqr_factor * (Q3 - Q1), [B] int32.

    Quartiles and outliers are those of the patches that are `present` [B, N]; None means all.
    """
    if present is not None:
        attention = jnp.where(present, attention, -jnp.inf)
    rank = selection.descending_rank(attention)
    count = None if present is None else present.sum(-1)
    bound = selection.outlier_bound(attention, rank, iqr_factor, count)
    return (attention > bound[:, None]).sum(-1)


def _number_selected(
    attention: jax.Array,
    rank: jax.Array,
    config: PruMergeConfig,
    present: jax.Array | None,
    tubes: Tubes | None,
) -> jax.Array:
    """Number of patches that the count rule keeps, [B] int32; attention is -inf where none is."""
    num_patches = attention.shape[-1]
    available = num_patches if present is None else present.sum(-1, dtype=jnp.int32)
    if config.count_rule == "all":
        return jnp.broadcast_to(jnp.int32(available), attention.shape[:1])
    if config.count_rule == "top":
        fixed = config.fixed_count(num_patches)
        number = jnp.full(attention.shape[:1], fixed, jnp.int32)
    else:
        count = None if present is None else present.sum(-1)
        bound = selection.outlier_bound(attention, rank, config.iqr_factor, count)
        number = (attention > (bound if tubes is None else tubes.bound)[:, None]).sum(-1)
    highest = num_patches if config.max_tokens is None else config.max_tokens
    least, most = (jnp.minimum(bound, available) for bound in (config.min_tokens, highest))
    return jnp.clip(number, least if tubes is None else jnp.where(tubes.whole, least, 0), most)


def _added(
    selected: jax.Array, number: jax.Array, config: PruMergeConfig, present: jax.Array | None
) -> jax.Array:
    """The patches that spatial sampling adds, [B, N] bool."""
    if config.added_patches == "none":
        return jnp.zeros_like(selected)
    spread = functools.partial(
        selection.spread,
        kind=config.added_patches,
        stride=config.stride,
        side=config.lattice_side(selected.shape[-1]),
    )
    if present is None:
        return spread(selected, number, jnp.arange(selected.shape[-1]), None)
    # Strides count the patches that are present alone, as though there were no others.
    nth, available = selection.count_before(present), present.sum(-1, keepdims=True)
    return present & spread(selected | ~present, number, nth, available)

"""PruMerge: adaptive reduction of visual tokens (arXiv 2403.15388), batched and of fixed shape.

The steps of the method, one function each:

1. `cls_attention`: how much the CLS token attends to every patch.
2. `select`: the patches whose attention is an outlier stay (section 3.2 of the paper), PruMerge+
   adds patches spread over the image (section 3.4).
3. `merge`: every patch that stays takes in its most similar neighbours (section 3.3); one extra
   token sums up what was dropped.

Shapes are static. An image keeps as many tokens as it needs, up to the capacity R; `lengths` says
how many, and `required` says how many it would have needed. Images never see each other, so the
batch may be sharded freely.

Axes: B batch, N patches, R capacity, D width of the vision tower.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Selecting in less than float32 changes the number of kept tokens in most images.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class PruMergeConfig:
    """What stays, what is added, how the rest is merged. See `preset` for the published settings.

    Attributes:
      selection: `iqr` keeps attention outliers, `top` the floor(N * ratio) most attended patches,
        `all` every patch.
      iqr_factor: outliers lie above Q3 + iqr_factor * (Q3 - Q1).
      ratio: share of patches that `top` keeps, and that `raster_fixed` adds.
      min_tokens, max_tokens: bounds on the number of selected patches; None is no bound.
      choice: `attention` is the method. `random` and `uniform` are baselines: each image keeps as
        many tokens as the method would give it, but patches chosen at random or evenly spaced, and
        unmerged.
      seed: of the choice `random`.
      spatial: patches added to the selected ones: `none`; `raster` every k-th patch with k derived
        from the number selected, as the reference's adaptive branch; `raster_fixed` every
        floor(1 / ratio)-th, selected ones doubled, as its training branch; `uniform` as many as
        were selected, evenly spread over the others, as the paper; `lattice` evenly spread in two
        dimensions.
      merge: `sum` adds attention-weighted neighbours to a token; `mean` takes the
        attention-weighted average of the token and its neighbours; `none`.
      neighbours: how many neighbours a token takes in.
      similarity: of keys, `cosine` or `dot`.
      pool: neighbours come from `all` other patches or only from the `pruned` ones.
      extra_token: whether to append the attention-weighted sum of the pruned patches.
      order: tokens by descending `attention` with the added ones behind, or in `raster` order.
      capacity: R; None is the most that N patches can need.
    """

    selection: Literal["iqr", "top", "all"] = "iqr"
    iqr_factor: float = 1.5
    ratio: float = 0.125
    min_tokens: int = 1
    max_tokens: int | None = None
    choice: Literal["attention", "random", "uniform"] = "attention"
    seed: int = 0
    spatial: Literal["none", "raster", "raster_fixed", "uniform", "lattice"] = "none"
    merge: Literal["sum", "mean", "none"] = "sum"
    neighbours: int = 32
    similarity: Literal["cosine", "dot"] = "cosine"
    pool: Literal["all", "pruned"] = "all"
    extra_token: bool = True
    order: Literal["attention", "raster"] = "attention"
    capacity: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed = getattr(field.type, "__args__", ())
            value = getattr(self, field.name)
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise ValueError(f"{field.name} is {value!r}; expected one of {allowed}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; expected 0 < ratio <= 1")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens is {self.min_tokens}; expected at least 0")
        if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least min_tokens and 1")
        if self.merge != "none" and self.neighbours < 1:
            raise ValueError(f"neighbours is {self.neighbours}; expected at least 1")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity is {self.capacity}; expected at least 1")

    def capacity_for(self, num_patches: int) -> int:
        """R: the capacity that was asked for, or else the most tokens an image can need."""
        if self.capacity is not None:
            return self.capacity
        if self.selection == "all":
            return num_patches
        # At most a quarter of all values can lie above the third quartile.
        most = self.fixed_count(num_patches) if self.selection == "top" else num_patches // 4
        most = max(self.min_tokens, most)
        if self.max_tokens is not None:
            most = min(most, self.max_tokens)
        most = {
            "none": most,
            "raster": num_patches,
            "raster_fixed": most + num_patches // self.stride,
            "uniform": min(2 * most, num_patches),
            "lattice": num_patches,
        }[self.spatial]
        return most + self.extra_token

    def fixed_count(self, num_patches: int) -> int:
        """The number of patches that the selection `top` keeps."""
        return int(num_patches * self.ratio)

    @property
    def stride(self) -> int:
        """The stride of `raster_fixed`."""
        return int(1 / self.ratio)


_PAPER: dict[str, Any] = {"merge": "mean", "similarity": "dot", "pool": "pruned"}
_FULL: dict[str, Any] = {
    "selection": "all",
    "merge": "none",
    "extra_token": False,
    "order": "raster",
}
_SELECT_ONLY: dict[str, Any] = {"merge": "none", "extra_token": False}
_PRESETS: dict[str, dict[str, Any]] = {
    "prumerge": {},
    "prumerge+": {"spatial": "raster"},
    "prumerge-fixed": {"selection": "top"},
    "prumerge+fixed": {"selection": "top", "spatial": "raster_fixed"},
    "paper": _PAPER,
    "paper+": _PAPER | {"spatial": "uniform"},
    "select-only": _SELECT_ONLY,
    "random": {"choice": "random"},
    "uniform": {"choice": "uniform"},
    "full": _FULL,
}


def preset(name: str, **overrides: Any) -> PruMergeConfig:
    """A published setting, with single parameters overridden by keyword.

    `prumerge` and `prumerge+` are the reference code at batch size 1, `prumerge-fixed` and
    `prumerge+fixed` its training branch, `paper` and `paper+` the text of the paper, `select-only`
    the paper's AITS ablation, `full` plain LLaVA. `random` and `uniform` are baselines with as many
    tokens as `prumerge`; `prumerge+` with `choice="random"` is one for `prumerge+`.

    Raises:
      ValueError: the name, or the value of an override, is not one that exists.
      TypeError: an override that is no field of `PruMergeConfig`.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown reduction {name!r}; expected one of {sorted(_PRESETS)}")
    return PruMergeConfig(**(_PRESETS[name] | overrides))


class VisualTokens(NamedTuple):
    """The visual tokens of a batch of images; the valid ones come first.

    Attributes:
      tokens: [B, R, D] in the dtype of the input; exactly zero behind `lengths`.
      lengths: [B] int32, valid tokens, the extra token included, at most R. 0 for an image whose
        attention was not finite.
      patch_indices: [B, R] int32, the patch a token stands for; -1 for the extra token and padding.
      required: [B] int32, tokens needed before the cap: above R, the tokens were cut and the image
        must be run again with more capacity. -1 for an image whose attention was not finite.
    """

    tokens: jax.Array
    lengths: jax.Array
    patch_indices: jax.Array
    required: jax.Array


class Selection(NamedTuple):
    """Which patches stay, and in which slot.

    Attributes:
      patch_indices: [B, R] int32, -1 behind the last staying patch.
      kept: [B] int32, staying entries before the cap; -1 where attention was not finite.
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

    Not the tower's own attention: queries and keys of all heads lie side by side, and the scale is
    D^-0.5 for the whole width D (clip_encoder.py of the reference).

    Args:
      query_cls: [B, D], CLS query of the last block, bias included.
      keys: [B, N+1, D], keys of the last block, CLS first.

    Returns:
      [B, N] float32: a softmax over N+1 entries without its first; it sums to less than 1.
    """
    query_cls, keys = query_cls.astype(jnp.float32), keys.astype(jnp.float32)
    logits = _einsum("bd,bnd->bn", query_cls, keys) * query_cls.shape[-1] ** -0.5
    return jax.nn.softmax(logits, axis=-1)[:, 1:]


def reduce_tokens(
    hidden: jax.Array, keys: jax.Array, attention: jax.Array, config: PruMergeConfig
) -> VisualTokens:
    """Selects and merges the visual tokens of every image on its own.

    Args:
      hidden: [B, N, D], patch features.
      keys: [B, N, D], keys of the last block, without CLS.
      attention: [B, N] float32 from `cls_attention`.
      config: the method's parameters; static under `jax.jit`.

    Returns:
      `VisualTokens` of capacity R = `config.capacity_for(N)`.
    """
    selection = select(attention, config)
    tokens = _rows(hidden, selection.patch_indices).astype(jnp.float32)
    is_method = config.choice == "attention"
    if is_method and config.merge != "none":
        tokens = merge(tokens, hidden, keys, attention, selection, config)
    slot = jnp.arange(tokens.shape[1])
    valid = slot < selection.kept[:, None]
    tokens = jnp.where(valid[..., None], tokens, 0)
    required = selection.kept
    if is_method and config.extra_token:
        # Its weights fill one row of a [1, N] x [N, D] product.
        extra = _weighted_sum(jnp.where(selection.pruned, attention, 0)[:, None], hidden)
        here = (slot == selection.kept[:, None])[..., None]
        tokens = jnp.where(here, extra, tokens)
        required = jnp.where(required < 0, required, required + 1)
    return VisualTokens(
        tokens=tokens.astype(hidden.dtype),
        lengths=jnp.clip(required, 0, tokens.shape[1]),
        patch_indices=selection.patch_indices,
        required=required,
    )


def select(attention: jax.Array, config: PruMergeConfig) -> Selection:
    """Chooses the patches that stay, from attention [B, N] alone."""
    attention = attention.astype(jnp.float32)
    num_patches = attention.shape[-1]
    finite = jnp.isfinite(attention).all(axis=-1)
    attention = jnp.where(finite[:, None], attention, 0)  # keeps NaN out of the integers below

    rank = _descending_rank(attention)
    number = _number_selected(attention, rank, config)
    selected = rank < number[:, None]
    added = _added(selected, number, config)
    if config.choice != "attention":
        total = selected.sum(-1) + added.sum(-1) + config.extra_token
        number = jnp.minimum(total, num_patches)
        rank = _baseline_rank(rank, number, config)
        selected, added = rank < number[:, None], jnp.zeros_like(added)

    if config.order == "attention":
        selected_slot = rank
        added_slot = number[:, None] + _count_before(added)
    else:
        selected_slot = _count_before(selected) + _count_before(added)
        added_slot = selected_slot + selected
    in_slot = _in_slot(selected, selected_slot, config) | _in_slot(added, added_slot, config)
    patch_indices = jnp.where(in_slot, jnp.arange(num_patches), 0).sum(-1)

    outside = ~(selected | added)
    doubled = (selected & added).sum(-1, keepdims=True)
    kept = selected.sum(-1) + added.sum(-1)
    return Selection(
        patch_indices=jnp.where(in_slot.any(-1) & finite[:, None], patch_indices, -1).astype(
            jnp.int32
        ),
        kept=jnp.where(finite, kept, -1).astype(jnp.int32),
        copies=selected.astype(jnp.int32) + added.astype(jnp.int32),
        pruned=outside & (_count_before(outside) >= doubled),
    )


def merge(
    tokens: jax.Array,
    hidden: jax.Array,
    keys: jax.Array,
    attention: jax.Array,
    selection: Selection,
    config: PruMergeConfig,
) -> jax.Array:
    """Adds to every staying token its attention-weighted nearest neighbours, themselves unmerged.

    Args:
      tokens: [B, R, D] float32, the staying rows of `hidden`.
      hidden, keys: [B, N, D].
      attention: [B, N] float32.
      selection: from `select`.
      config: the method's parameters.

    Returns:
      [B, R, D] float32.
    """
    weights = nearest(keys, selection, config) * attention[:, None]
    neighbours = _weighted_sum(weights, hidden)
    if config.merge == "sum":
        return tokens + neighbours
    own = _rows(attention[..., None], selection.patch_indices)
    total = own + weights.sum(-1, keepdims=True)
    return jnp.where(total > 0, (own * tokens + neighbours) / total, tokens)


def nearest(keys: jax.Array, selection: Selection, config: PruMergeConfig) -> jax.Array:
    """The neighbours every staying token takes in.

    Ties go to the lower patch index. An image with fewer other patches than `config.neighbours`
    gives all of them.

    Returns:
      [B, R, N] int32: how many copies of patch n are among the neighbours of the token in slot r
      (more than 1 only where a patch stays twice). Meaningless behind the last token.
    """
    keys = _comparable(keys, config.similarity)
    chosen = _rows(keys, selection.patch_indices)
    if config.similarity == "cosine":
        # Unit keys share a large common part. Taken off one side, it shifts all similarities of a
        # token alike and leaves several times less rounding to decide between neighbours.
        keys = keys - keys.mean(axis=1, keepdims=True)
    similarity = _einsum("brd,bnd->brn", chosen, keys)
    available = selection.pruned.astype(jnp.int32)
    if config.pool == "all":
        available = available + selection.copies
    own = selection.patch_indices[..., None] == jnp.arange(keys.shape[1])
    available = jnp.where(own, available[:, None] - (config.pool == "all"), available[:, None])
    return _copies_among_largest(similarity, available, config.neighbours)


def merge_targets(keys: jax.Array, selection: Selection, config: PruMergeConfig) -> jax.Array:
    """Where every patch goes, for looking at: the slot it lends most of itself to.

    Returns:
      [B, N] int32: a staying patch its own slot, a pruned one the slot of the most similar token
      that takes it in, -1 where none does.
    """
    capacity = selection.patch_indices.shape[1]
    own = selection.patch_indices[..., None] == jnp.arange(keys.shape[1])
    if config.merge == "none":
        claims = jnp.where(own, 1.0, -jnp.inf)
    else:
        comparable = _comparable(keys, config.similarity)
        chosen = _rows(comparable, selection.patch_indices)
        similarity = _einsum("brd,bnd->brn", chosen, comparable)
        staying = jnp.arange(capacity)[:, None] < selection.kept[:, None, None]
        taken = (nearest(keys, selection, config) > 0) & selection.pruned[:, None] & staying
        claims = jnp.where(taken, similarity, jnp.where(own, jnp.inf, -jnp.inf))
    return jnp.where(claims.max(1) > -jnp.inf, claims.argmax(1), -1).astype(jnp.int32)


def _number_selected(attention: jax.Array, rank: jax.Array, config: PruMergeConfig) -> jax.Array:
    """How many patches the selection rule keeps, [B] int32."""
    num_patches = attention.shape[-1]
    if config.selection == "all":
        return jnp.full(attention.shape[:1], num_patches, jnp.int32)
    if config.selection == "top":
        fixed = config.fixed_count(num_patches)
        number = jnp.full(attention.shape[:1], fixed, jnp.int32)
    else:
        q1 = _quantile(attention, rank, 0.25)
        q3 = _quantile(attention, rank, 0.75)
        bound = q3 + config.iqr_factor * (q3 - q1)
        number = (attention > bound[:, None]).sum(-1)
    highest = num_patches if config.max_tokens is None else min(config.max_tokens, num_patches)
    return jnp.clip(number, min(config.min_tokens, num_patches), highest)


def _added(selected: jax.Array, number: jax.Array, config: PruMergeConfig) -> jax.Array:
    """The patches that spatial sampling adds, [B, N] bool."""
    num_patches = selected.shape[-1]
    patch = jnp.arange(num_patches)
    number = number[:, None]
    if config.spatial == "none":
        return jnp.zeros_like(selected)
    if config.spatial == "raster_fixed":
        here = np.zeros(num_patches, bool)
        here[config.stride // 2 : num_patches - 1 : config.stride] = True
        return jnp.broadcast_to(jnp.asarray(here), selected.shape)
    if config.spatial == "raster":
        # The reference crashes at a stride of 0 (a third of all patches selected): 1 adds all.
        stride = jnp.maximum(num_patches // jnp.maximum(number, 1) // 3, 1)
        return (patch % stride == 0) & (patch < num_patches - 1) & ~selected
    if config.spatial == "uniform":
        others = num_patches - number
        return ~selected & _evenly_spread(
            _count_before(~selected), jnp.minimum(number, others), jnp.maximum(others, 1)
        )
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"spatial='lattice' needs a square grid; got {num_patches} patches")
    points = (jnp.arange(side) ** 2 < number).sum(-1, keepdims=True)  # ceil(sqrt(number))
    on_row = _evenly_spread(patch // side, points, side)
    on_column = _evenly_spread(patch % side, points, side)
    return on_row & on_column & ~selected


def _baseline_rank(rank: jax.Array, number: jax.Array, config: PruMergeConfig) -> jax.Array:
    """A rank [B, N] that ignores attention, but for the number of patches it will keep."""
    num_patches = rank.shape[-1]
    if config.choice == "uniform":
        member = _evenly_spread(jnp.arange(num_patches), number[:, None], num_patches)
        return jnp.where(member, _count_before(member), number[:, None] + _count_before(~member))

    # Seeded by the image's own integers, so that batch mates play no part.
    def draw(top_patch: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(config.seed), top_patch * num_patches + number)
        return jax.random.uniform(key, (num_patches,))

    top_patch = jnp.where(rank == 0, jnp.arange(num_patches), 0).sum(-1)
    return _descending_rank(jax.vmap(draw)(top_patch, number))


def _descending_rank(a: jax.Array) -> jax.Array:
    """[B, N] -> [B, N] int32, 0 for the largest, ties to the lower index."""
    n = jnp.arange(a.shape[-1])
    larger = a[:, None, :] > a[:, :, None]
    tie_before = (a[:, None, :] == a[:, :, None]) & (n[None, :] < n[:, None])
    return (larger | tie_before).sum(-1)


def _quantile(a: jax.Array, rank: jax.Array, q: float) -> jax.Array:
    """numpy's linearly interpolated quantile of [B, N] along N, from its descending rank."""
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


def _evenly_spread(index: jax.Array, points: jax.Array, size: jax.Array | int) -> jax.Array:
    """Whether `index` is one of floor((i + 1/2) size / points) for i = 0 ... points - 1."""

    def points_up_to(i: jax.Array) -> jax.Array:
        return (2 * points * (i + 1) + size - 1) // (2 * size)

    return points_up_to(index) > points_up_to(index - 1)


def _count_before(member: jax.Array) -> jax.Array:
    """[B, N] bool -> [B, N] int32, members at lower indices."""
    return jnp.cumsum(member, axis=-1, dtype=jnp.int32) - member


def _in_slot(member: jax.Array, slot_of: jax.Array, config: PruMergeConfig) -> jax.Array:
    """[B, R, N] bool: patch n is a member and lies in slot r."""
    slot = jnp.arange(config.capacity_for(member.shape[-1]))
    return member[:, None] & (slot_of[:, None] == slot[:, None])


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` [B, R] of x [B, N, D]; row 0 where the index is -1."""
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)


def _weighted_sum(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    """[B, R, N] float32 x [B, N, D] -> [B, R, D] float32.

    Values, unlike the choice of patches, may be multiplied in the precision they come in.
    """
    if hidden.dtype == jnp.float32:
        return _einsum("brn,bnd->brd", weights, hidden)
    return jnp.einsum(
        "brn,bnd->brd", weights.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32
    )


def _comparable(keys: jax.Array, similarity: str) -> jax.Array:
    """Keys [B, N, D] whose inner products are the similarity: for `cosine` of length 1."""
    keys = keys.astype(jnp.float32)
    if similarity == "dot":
        return keys
    return keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)


def _copies_among_largest(x: jax.Array, available: jax.Array, k: int) -> jax.Array:
    """How many copies of each entry are among the k largest along the last axis.

    Bisection on order-preserving integers instead of a sort: a partial sort is several times slower
    on CPU, and on a sharded batch it gathers.

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

"""What a reduction is, what it may read, and what it returns.

Axes: B batch, N patches, R capacity, D width of the vision tower, H its heads, Dt width of the
decoder, M tokens of a question.
"""

import dataclasses
from typing import NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax import selection
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.drops import Drops
from prumerge_jax.reductions.stages import Groups, Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a batch of images; a pytree. A field that no method asked for is None.

    Attributes:
      hidden: [B, N, D], patch features: the last hidden state but one, without CLS.
      keys: [B, N, D], keys of the last block, without CLS.
      attention: [B, N] float32 from `prumerge.cls_attention`.
      cls: [B, D], the CLS row of the hidden state.
      head_attention: [B, H, N] float32, per head the softmax of the CLS row in the layer that made
        `hidden`, over N+1 entries, its first dropped.
      feature_keys: [B, N, D], keys of that layer.
      feature_attention: [B, N] float32, `attention` of that layer instead of the last one.
      last_head_attention: [B, H, N] float32, `head_attention` of the last layer.
      first_attention: [B, N] float32, `head_attention` of the first layer, summed over heads.
      watched: [B, N] float32, the method's running score over the tower's layers, see
        `Reduction.watch`.
      projected: [B, N, Dt], all patches through the projector.
      question: ([B, M, Dt], [B, M] bool), the question's embeddings and which of them are real.
      groups: what the tokens stand for, where the tower merged some; `hidden`, `keys` and
        `attention` then have as many as are left.
      present: [B, N] bool, False for patches of the padding around an image.
      first_frame: [B] bool, of the frames of videos, one after the other: those that begin one.
    """

    hidden: jax.Array
    keys: jax.Array
    attention: jax.Array
    _: dataclasses.KW_ONLY
    cls: jax.Array | None = None
    head_attention: jax.Array | None = None
    feature_keys: jax.Array | None = None
    feature_attention: jax.Array | None = None
    last_head_attention: jax.Array | None = None
    first_attention: jax.Array | None = None
    watched: jax.Array | None = None
    projected: jax.Array | None = None
    question: tuple[jax.Array, jax.Array] | None = None
    groups: Groups | None = None
    present: jax.Array | None = None
    first_frame: jax.Array | None = None


class Assignment(NamedTuple):
    """What became of every patch, for display.

    Attributes:
      patch_indices: [B, R] int32, the patch of every token; -1 for tokens that are not a patch,
        and for padding.
      targets: [B, N] int32, the slot of the token that holds most of a patch: its own for a kept
        one, -1 for one that went nowhere.
      required: [B] int32, as in `VisualTokens`.
    """

    patch_indices: jax.Array
    targets: jax.Array
    required: jax.Array


@runtime_checkable
class Reduction(Protocol):
    """A method that turns N patch features into at most R visual tokens per image.

    Implementations are frozen dataclasses whose fields are the parameters (see
    `prumerge_jax.options`): equal parameters are equal and hash alike, so that a reduction is a
    static argument under `jax.jit` and an equal one compiles nothing. They derive from this class
    and override what differs. Images of a batch never see each other.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Evidence` that the method reads in addition to hidden, keys and attention."""
        return frozenset()

    @property
    def varying(self) -> bool:
        """Whether the number of tokens differs from image to image."""
        return False

    @property
    def selects_patches(self) -> bool:
        """Whether some patches are kept and others are not."""
        return True

    @property
    def raster_order(self) -> bool:
        """Whether tokens come in the order of their patches."""
        return True

    @property
    def question_tokens(self) -> int:
        """M: most tokens of a question; above 0 if `needs` has `question`."""
        return 0

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens stand for several patches, and attention is to know how many.

        `reduce` then returns tokens of width D + 1, with the logarithm of the number last.
        """
        return False

    @property
    def takes_several_crops(self) -> bool:
        """Whether an image of several crops can be reduced."""
        return True

    def for_crops(self, most: int) -> "Reduction":
        """The reduction on a model whose images have up to `most` crops.

        Itself, unless the crops of an image share its tokens out. Of such a reduction `reduce`
        returns the tokens of every crop in the order in which they are chosen, as many as its
        share can be, and with them `VisualTokens.content`; the crop keeps the first of them, as
        many as `crop_shares` says, in the order of their patches.
        """
        return self

    def crop_shares(self, content: np.ndarray, tile: np.ndarray, num_crops: int) -> np.ndarray:
        """How many of its tokens each crop of an image keeps at most, int [num_crops]; asked for
        where `reduce` returned a content. By default all.

        Args:
          content: [N] float32, that of the whole image.
          tile: int [N], the crop whose part of the whole image every patch lies in, from 1.
          num_crops: crops of the image, the whole image first.
        """
        return np.full(num_crops, content.size)

    @property
    def drops_tokens(self) -> bool:
        """Whether visual tokens leave inside the decoder; `drops` says which."""
        return False

    def drops(self, depth: int) -> Drops | None:
        """What leaves a decoder of `depth` layers; None where `drops_tokens` is false.

        Raises:
          ValueError: the decoder has too few layers.
        """
        return None

    def capacity_for(self, num_patches: int) -> int:
        """R: token slots per image of `num_patches` patches."""
        ...

    def reduces(self, num_patches: int) -> bool:
        """Whether an image of `num_patches` patches may have other tokens than these."""
        return self.selects_patches or self.capacity_for(num_patches) < num_patches

    @property
    def merges_frames(self) -> bool:
        """Whether what stays alike in consecutive frames of a video is merged.

        `Evidence.first_frame` then says where videos begin; none is split over batches.
        """
        return False

    @property
    def frame_cls(self) -> bool:
        """Whether the tower's CLS feature stands in front of every frame, of models that show it
        where nothing is pruned."""
        return not self.selects_patches

    def uncapped(self) -> Self:
        """The same reduction with room for the most tokens that any image can need."""
        return self

    def image_size(self, image_size: int, patch_size: int) -> int:
        """Side in pixels of the images that the tower is to see.

        Args:
          image_size: side of the tower's native images.
          patch_size: side of a patch.

        Raises:
          ValueError: the tower cannot provide it.
        """
        return image_size

    def stages(self, depth: int, num_patches: int) -> tuple[Stage, ...]:
        """Merges inside the tower, by ascending layer; called if `needs` has `groups`.

        Args:
          depth: layers of the tower that features come from.
          num_patches: N.
        """
        return ()

    def watch(
        self, score: jax.Array, before: jax.Array, after: jax.Array, depth: jax.Array
    ) -> jax.Array:
        """The running score after one more layer of the tower; called if `needs` has `watched`.

        Args:
          score: [B, N] float32, 0 before the first layer.
          before, after: [B, N, D], the patches before and after the layer.
          depth: float32 [], the layer's number over that of all layers, from 0.

        Returns:
          [B, N] float32.
        """
        return score

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """Tokens for every image; see `reductions.reduce`, which checks the evidence."""
        ...

    def explain(self, evidence: Evidence) -> Assignment:
        """What becomes of every patch; by default kept or dropped, as the tokens say."""
        visual = self.reduce(evidence)
        num_patches = evidence.hidden.shape[1]
        own = visual.patch_indices[..., None] == jnp.arange(num_patches)
        targets = jnp.where(own.any(1), own.argmax(1), -1).astype(jnp.int32)
        return Assignment(visual.patch_indices, targets, visual.required)


def kept_rows(hidden: jax.Array, patch_indices: jax.Array, kept: jax.Array) -> VisualTokens:
    """Unmerged patch features as visual tokens.

    Args:
      hidden: [B, N, D].
      patch_indices: [B, R] int32, the patch of every token, the kept ones first, then -1.
      kept: [B] int32, patches to keep before the cap; -1 where the evidence was not finite.
    """
    capacity = patch_indices.shape[1]
    patch_indices = jnp.where((kept >= 0)[:, None], patch_indices, -1)
    valid = (jnp.arange(capacity) < kept[:, None])[..., None]
    return VisualTokens(
        tokens=jnp.where(valid, selection.rows(hidden, patch_indices), 0),
        lengths=jnp.clip(kept, 0, capacity),
        patch_indices=patch_indices,
        required=kept,
    )


def all_available(evidence: Evidence) -> jax.Array:
    """Patches that may be chosen, [B, N] bool: all that are no padding."""
    if evidence.present is not None:
        return evidence.present
    return jnp.ones(evidence.hidden.shape[:2], bool)


def finite_evidence(evidence: Evidence, *fields: str) -> jax.Array:
    """Images of which `hidden` and these fields are finite, [B] bool."""
    values = [getattr(evidence, field) for field in ("hidden", *sorted(fields))]
    return finite_images(*jax.tree.leaves(values))


def finite_images(*arrays: jax.Array) -> jax.Array:
    """Images of which every array [B, ...] is finite, [B] bool."""
    flat = [jnp.isfinite(x.astype(jnp.float32)).reshape(len(x), -1).all(-1) for x in arrays]
    return jnp.stack(flat).all(0)


def zero_unless(finite: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, ...] with zeros for images that are not finite [B]; they get no tokens."""
    return jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def without_nan(evidence: Evidence, finite: jax.Array) -> Evidence:
    """The evidence with zeros for images that are not finite."""

    def clean(x: jax.Array) -> jax.Array:
        return zero_unless(finite, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(clean, evidence)

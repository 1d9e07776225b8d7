"""What a reduction does to the crops of an image or the frames of a video."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from prumerge_jax import reductions
from prumerge_jax.data.pictures import Picture
from prumerge_jax.data.visual_layout import shared_lengths
from prumerge_jax.engine.encoding import PlacedModel, frame_form
from prumerge_jax.models.frames import FrameForm
from prumerge_jax.models.llava import embed_question, gather_evidence
from prumerge_jax.reductions import Reduction

_POOLED_PIXELS = 28
"""Side in pixels at which a token of a pooled frame is shown."""


class Explanation(NamedTuple):
    """What a reduction does to one crop or frame.

    Attributes:
      pixels: uint8 [S, S, 3], the crop as the tower sees it: without rows and columns beyond the
        last patch; of a frame whose patches are pooled, resized to a multiple of what is left.
      patch_indices: int32 [n], the kept patches in the order of their tokens.
      assignment: int32 [N], for each patch the index into `patch_indices` of the token it merges
        into, -1 for none.
    """

    pixels: np.ndarray
    patch_indices: np.ndarray
    assignment: np.ndarray


def explain_crops(
    model: PlacedModel, picture: Picture, reduction: Reduction, question_ids: jax.Array | None
) -> list[Explanation]:
    """What a reduction does to each crop, or to each frame.

    Args:
      model: the model.
      picture: the crops.
      reduction: what happens to the visual tokens.
      question_ids: int32 [1, M] of the question, -1 beyond it; None where none is read.

    Raises:
      ValueError: the tower's attention is not finite on a crop; the message says which.
    """
    crops, layout = picture
    reduction = reduction.for_crops(model.config.most_crops)
    form = frame_form(model.config, reduction) if layout.frames else None
    on_image = None
    if any(layout.tiles):
        on_image = jnp.asarray(layout.on_image())
    first_frame = jnp.arange(len(crops)) == 0 if layout.frames else None
    assignment, content = _explain(
        model.graphdef,
        model.state,
        jnp.asarray(crops),
        None if question_ids is None else jnp.repeat(question_ids, len(crops), axis=0),
        on_image,
        first_frame,
        reduction=reduction,
        dtype=model.dtype,
        form=form,
    )
    shown = [np.asarray(values) for values in assignment]
    if content is not None:
        lengths = shared_lengths(
            (shown[0] >= 0).sum(1), np.asarray(content), [(layout, range(len(crops)))], reduction
        )
        shown[:2] = _first_tokens(shown[0], lengths, layout.num_patches)
    patch = model.config.vision.patch_size
    explained = []
    for number, (patches, targets, required) in enumerate(zip(*shown, strict=True)):
        if required < 0:
            where = "image" if len(crops) == 1 else f"image's crop {number}"
            raise ValueError(f"the {where}'s CLS attention is not finite; check the weights")
        is_patch = patches >= 0
        # Of target -1: -1.
        place = np.append(np.where(is_patch, np.cumsum(is_patch) - 1, -1), -1)
        pixels = _shown_pixels(crops[number], targets.size, patch)
        explained.append(Explanation(pixels, patches[is_patch], place[targets].astype(np.int32)))
    return explained


def _first_tokens(
    patches: np.ndarray, lengths: np.ndarray, num_patches: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of every crop in the order of their patches, [C, R] and -1 beyond them, and
    their targets [C, N]; see `reductions.Assignment`."""
    within = np.arange(patches.shape[1]) < lengths[:, None]
    ordered = np.sort(np.where(within, patches, num_patches), axis=1)
    targets = np.full((len(patches), num_patches + 1), -1)
    np.put_along_axis(targets, ordered, np.arange(patches.shape[1])[None], axis=1)
    return np.where(within, ordered, -1), targets[:, :num_patches]


def _shown_pixels(crop: np.ndarray, num_patches: int, patch: int) -> np.ndarray:
    side = round(num_patches**0.5)
    if side == len(crop) // patch:
        return crop[: side * patch, : side * patch]
    size = (side * _POOLED_PIXELS,) * 2
    return np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC))


@functools.partial(jax.jit, static_argnames=("graphdef", "reduction", "dtype", "form"))
def _explain(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    question_ids: jax.Array | None,
    on_image: jax.Array | None,
    first_frame: jax.Array | None,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
    form: FrameForm | None,
) -> tuple[reductions.Assignment, jax.Array | None]:
    """The assignment, and what `VisualTokens.content` is."""
    model = nnx.merge(graphdef, state)
    evidence = gather_evidence(
        model.tower(is_video=form is not None),
        pixels,
        reduction,
        dtype=dtype,
        projector=model.projector,
        question=embed_question(model.decoder, question_ids, dtype),
        present=on_image,
        first_frame=first_frame,
        form=form,
    )
    return reductions.explain(evidence, reduction), evidence.first_attention

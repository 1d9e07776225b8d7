"""How well the patches that a rule keeps cover images; nothing of it needs a label."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.data.images import ImageMode, ImageProcessor, ImageSource
from prumerge_jax.llava import Llava
from prumerge_jax.models.llava import gather_evidence
from prumerge_jax.reductions.set_rules import Cover


def coverage(
    model: Llava, images: Sequence[ImageSource], rule: Cover, *, image_mode: ImageMode = "pad"
) -> np.ndarray:
    """Coverage of each image after every choice of a rule.

    Args:
      model: whose tower is used.
      images: their sources; all are in one batch.
      rule: in whose order patches are kept; its counts have no effect.
      image_mode: `pad` or `crop`.

    Returns:
      float32 [images, N], after each of the N choices the mean over patches of the similarity to
      the nearest kept one.

    Raises:
      ImageError: an image cannot be used.
      ValueError: the features of an image are not finite.
    """
    side = model.image_size(rule)
    processor = ImageProcessor(side, model.config.vision.pixel_mean, image_mode)
    size = 1 << max(len(images) - 1, 0).bit_length()
    pixels = np.zeros((size, side, side, 3), np.uint8)
    for row, image in zip(pixels, images, strict=False):
        row[:] = processor(image)
    placed = model.engine(rule, []).model
    with model.placed():
        covered = np.asarray(
            _coverage(placed.graphdef, placed.state, pixels, rule=rule, dtype=placed.dtype)
        )[: len(images)]
    if not np.isfinite(covered).all():
        raise ValueError("the features of an image are not finite; check the weights")
    return covered


@functools.partial(jax.jit, static_argnames=("graphdef", "rule", "dtype"))
def _coverage(
    graphdef: nnx.GraphDef, state: nnx.State, pixels: jax.Array, *, rule: Cover, dtype: jnp.dtype
) -> jax.Array:
    vision = nnx.merge(graphdef, state).vision
    evidence = gather_evidence(vision, pixels, rule, dtype=dtype)
    everywhere = jnp.ones(evidence.attention.shape, bool)
    covered = rule.order(evidence, everywhere, everywhere.shape[1]).coverage
    assert covered is not None
    return covered

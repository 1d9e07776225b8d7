"""Images to what the decoder receives of them, for decoders that run elsewhere."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.models.llava import encode_images
from prumerge_jax.reductions import Reduction, require_before_decoder


def embed(
    model: PlacedModel, pixels: Iterable[np.ndarray], reduction: Reduction
) -> Iterator[np.ndarray]:
    """Projected visual tokens, float32 [n, Dt], of every image in turn; n differs by image.

    Args:
      model: the model.
      pixels: uint8 [S, S, 3] of each image.
      reduction: one that reads no question.

    Raises:
      ValueError: the reduction reads the question or drops tokens in the decoder, or an image's
        attention is not finite.
    """
    require_before_decoder(reduction, "embedding")
    if reduction.question_tokens:
        raise ValueError("the reduction reads the question; embeddings are made of images alone")
    whole = reduction.uncapped()
    for number, image in enumerate(pixels):
        tokens, length = _embed(
            model.graphdef,
            model.state,
            model.put(image[None]),
            reduction=whole,
            dtype=model.dtype,
        )
        if int(length[0]) < 1:
            raise ValueError(f"image {number} has no visual tokens; check the weights")
        yield np.asarray(tokens[0, : int(length[0])], np.float32)


@functools.partial(jax.jit, static_argnames=("graphdef", "reduction", "dtype"))
def _embed(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """[1, S, S, 3] -> ([1, R, Dt], [1])."""
    model = nnx.merge(graphdef, state)
    visual = encode_images(model.vision, pixels, reduction, dtype=dtype, projector=model.projector)
    return model.projector(visual.tokens.astype(dtype)), visual.lengths

"""How alike consecutive frames of a video are, and what merging them over time would leave."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax import reductions
from prumerge_jax.data.images import Video, VideoFile
from prumerge_jax.engine.encoding import frame_form
from prumerge_jax.llava import Llava
from prumerge_jax.models.frames import FrameForm
from prumerge_jax.models.llava import gather_evidence
from prumerge_jax.reductions.prumerge import PruMerge
from prumerge_jax.reductions.temporal import similarity


class FrameSimilarity(NamedTuple):
    """One video of F frames with N patches each.

    Attributes:
      cosine: float32 [F - 1, N], of the features of a patch and the one at its place in the frame
        before, as `merge_frames` compares them; -inf where one has no length.
      tokens: int [T], visual tokens of the video under each of T rules.
    """

    cosine: np.ndarray
    tokens: np.ndarray


def frame_similarity(
    model: Llava, video: Video | VideoFile, rules: Sequence[PruMerge], name: str = "video"
) -> FrameSimilarity:
    """Compares the frames of a video, and reduces it by each of several rules.

    Args:
      model: whose tower is used.
      video: its frames are in one batch.
      rules: PruMerge with several values of `temporal`, otherwise equal.
      name: of the video in errors.

    Raises:
      ImageError: the video cannot be used, or the model takes none.
      ValueError: the features of a frame are not finite.
    """
    crops, _ = model.processor(None, rules[0])(video, name)
    placed = model.engine(rules[0], []).model
    form = frame_form(placed.config, rules[0])
    with model.placed():
        cosine, required = _compare(
            placed.graphdef,
            placed.state,
            jnp.asarray(crops),
            rules=tuple(rules),
            dtype=placed.dtype,
            form=form,
        )
    counts = np.asarray(required)
    if (counts < 0).any():
        raise ValueError(f"{name}: the features of a frame are not finite; check the weights")
    with_cls = int(form is not None and form.cls) * len(crops)
    return FrameSimilarity(np.asarray(cosine)[1:], counts.sum(1) + with_cls)


@functools.partial(jax.jit, static_argnames=("graphdef", "rules", "dtype", "form"))
def _compare(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    *,
    rules: tuple[PruMerge, ...],
    dtype: jnp.dtype,
    form: FrameForm | None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines [F, N], those of the first frame meaningless, and tokens [T, F]; -1 where the
    evidence is not finite."""
    evidence = gather_evidence(
        nnx.merge(graphdef, state).tower(is_video=form is not None),
        pixels,
        rules[0],
        dtype=dtype,
        first_frame=jnp.arange(len(pixels)) == 0,
        form=form,
    )
    required = [reductions.reduce(evidence, rule).required for rule in rules]
    return similarity(evidence.hidden), jnp.stack(required)

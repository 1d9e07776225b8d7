"""Image-text contrastive pre-training of a vision tower, so that its CLS attention means something.

PruMerge reads which patches matter off the attention of the CLS token in the tower's last block.
Here the image embedding is pooled by that very attention, so the loss teaches it to look at what
the caption mentions, and it becomes sparse. The loss is CLIP's (arXiv 2103.00020), over groups of
images that are told apart by the detail to be learned; equal captions are positives of each
other. The text tower and the two output layers are needed only here and are not exported; the
vision tower is exported with its attention sharpened.

Axes: B images, G groups, K images per group, N patches of a window, T caption tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax import prumerge
from prumerge_jax.models import tuning
from prumerge_jax.models.config import TextConfig, VisionConfig
from prumerge_jax.models.layers import Linear
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.llava import normalize_pixels
from prumerge_jax.models.tuning import Tuning
from prumerge_jax.models.vision_tower import VisionTower
from prumerge_jax.training.weights import AbstractModule, Leaf, Weights

_POSITIONS = "vision.position_embedding"
_QUERIES = ("vision.last.q_proj.kernel", "vision.last.q_proj.bias")


class CaptionBatch(NamedTuple):
    """Images with captions, K consecutive ones per group.

    Attributes:
      pixels: uint8 [B, s, s, 3], a square window of an image, or all of it.
      patches: int32 [B, N], its patches' places in the full image, as raster indices.
      ids: int32 [B, T], caption tokens, padded with 0.
      lengths: int32 [B], tokens per caption.
    """

    pixels: Leaf
    patches: Leaf
    ids: Leaf
    lengths: Leaf


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The parts that only this objective has.

    Attributes:
      text: sizes of the text tower, a small LLaMA read at the caption's last token.
      width: width of the common embedding space.
      group: K, how many consecutive images compete.
      temperature: initial temperature; it is learned.
    """

    text: TextConfig
    width: int
    group: int
    temperature: float = 0.07


class ContrastiveModel(nnx.Module):
    """A vision tower, a text tower and what brings both into one space."""

    def __init__(self, vision: VisionConfig, config: ContrastiveConfig, *, rngs: nnx.Rngs) -> None:
        self.vision = VisionTower(vision, rngs=rngs)
        self.value = Linear(vision.width, vision.width, ("embed", None), bias=True, rngs=rngs)
        self.image_out = Linear(vision.width, config.width, ("embed", None), rngs=rngs)
        self.text = Llama(config.text, rngs=rngs)
        self.text_out = Linear(config.text.width, config.width, ("embed", None), rngs=rngs)
        self.log_temperature = nnx.Param(jnp.log(jnp.float32(config.temperature)), out_sharding=())

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, s, s, 3] uint8 -> unit vectors [B, E], pooled by the CLS attention."""
        features = self.vision(normalize_pixels(pixels, self.vision.config))
        attention = prumerge.cls_attention(features.queries[:, 0], features.keys)
        assert self.vision.last is not None
        values = self.value(self.vision.last.layer_norm1(features.hidden[:, 1:]))
        return _unit(self.image_out(jnp.einsum("bn,bnd->bd", attention, values)))

    def embed_captions(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Captions [B, T] -> unit vectors [B, E]."""
        column = jnp.arange(ids.shape[1])
        positions = jnp.broadcast_to(column, ids.shape)
        segments = (column < lengths[:, None]).astype(jnp.int32)
        hidden = self.text(self.text.embed(ids, jnp.float32), positions, segments)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return _unit(self.text_out(last))


def contrastive_module(
    vision: VisionConfig, config: ContrastiveConfig
) -> AbstractModule[ContrastiveModel]:
    """The abstract module of a `ContrastiveModel`."""
    return AbstractModule.of(lambda seed: ContrastiveModel(vision, config, rngs=nnx.Rngs(seed)))


def contrastive_loss(
    weights: Weights, batch: CaptionBatch, *, vision: VisionConfig, config: ContrastiveConfig
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE in both directions, summed over the images, and their number.

    Args:
      weights: those of a `ContrastiveModel`.
      batch: its size a multiple of `config.group`.
      vision: sizes of the tower.
      config: the other sizes.
    """
    # A window is a smaller image that has the position embeddings of its place in the full one.
    module = contrastive_module(
        dataclasses.replace(vision, image_size=batch.pixels.shape[1]), config
    )
    cls = jnp.zeros_like(batch.patches[:, :1])
    rows = jnp.concatenate([cls, 1 + batch.patches], axis=1)
    model = module.merge({**weights, _POSITIONS: weights[_POSITIONS][rows]})
    groups = (-1, config.group, config.width)
    # Many short sequences: one product for all of them, whatever a platform prefers for long ones.
    with tuning.use(Tuning.plain()):
        images = model.embed_images(batch.pixels).reshape(groups)
        texts = model.embed_captions(batch.ids, batch.lengths).reshape(groups)
    logits = jnp.einsum("gke,gje->gkj", images, texts) / jnp.exp(model.log_temperature[...])
    captions = batch.ids.reshape(-1, config.group, batch.ids.shape[1])
    same = (captions[:, :, None] == captions[:, None]).all(-1)
    loss = _info_nce(logits, same) + _info_nce(logits.swapaxes(1, 2), same)
    return loss.sum() / 2, jnp.float32(len(batch.pixels))


def scale_cls_queries(weights: Weights, cls_attention_gain: float) -> Weights:
    """The weights with the logits of the CLS attention multiplied by `cls_attention_gain`.

    The loss likes attention on all patches that show a detail. Where details cover more than a
    quarter of an image, the third quartile is then among them, and PruMerge keeps few patches of
    each. LLaVA takes its features from the block before the last, so nothing else depends on these
    queries.

    Args:
      weights: those of a `ContrastiveModel`, or some of them.
      cls_attention_gain: 1 leaves them as they are.
    """
    return {
        path: weight * cls_attention_gain if path in _QUERIES else weight
        for path, weight in weights.items()
    }


def _info_nce(logits: jax.Array, positive: jax.Array) -> jax.Array:
    """-log of the share of the positives in each row's softmax, [G, K]."""
    positives = jax.nn.logsumexp(jnp.where(positive, logits, -jnp.inf), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - positives


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)

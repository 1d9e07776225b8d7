"""The vision tower, CLIP's or SigLIP's, as far as LLaVA and PruMerge need it.

CLIP: the features are the input of the last block, and PruMerge asks that block only for the keys
of all tokens and the query of the CLS token. So the last block is reduced to one LayerNorm and two
projections; its attention, its MLP and the final LayerNorm do not exist here.

SigLIP: the features are the output of the last block, before the final LayerNorm. There is no CLS
token; keys and queries of all patches are those of the block that made the features.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.models.attention import attend, padded_length
from prumerge_jax.models.config import VisionConfig
from prumerge_jax.models.layers import LayerNorm, Linear, stack
from prumerge_jax.models.patch_attention import mean_query_attention
from prumerge_jax.models.tower_layers import LayerOutputs, Watch, run_layers
from prumerge_jax.models.tower_stages import run_stages
from prumerge_jax.reductions.stages import Groups, Stage
from prumerge_jax.sharding.mesh import constrain


class VisionFeatures(NamedTuple):
    """What PruMerge reads off the tower. P is 1 with a CLS token, which comes first, else 0.

    Attributes:
      hidden: [B, P+N, D], the features: the output of the last block but one, or of the last.
      queries: [B, 1, D] float32, the CLS query of the last block, all heads side by side; without
        a CLS token [B, N, D], those of all patches.
      keys: [B, P+N, D] float32, the keys of the last block, all heads side by side.
      feature_query: [B, D] float32, the CLS query of the block that made `hidden`, where asked for.
      feature_keys: [B, P+N, D] float32, its keys, where asked for.
      watched: [B, N] float32, a running score of the layers, where asked for.
      first_query: [B, D] float32, the CLS query of the first block, where asked for.
      first_keys: [B, P+N, D] float32, its keys, where asked for.
      groups: what the tokens stand for, where some were merged; N is then how many are left.
    """

    hidden: jax.Array
    queries: jax.Array
    keys: jax.Array
    feature_query: jax.Array | None = None
    feature_keys: jax.Array | None = None
    watched: jax.Array | None = None
    first_query: jax.Array | None = None
    first_keys: jax.Array | None = None
    groups: Groups | None = None


class VisionTower(nnx.Module):
    """A vision transformer up to what its last block shows (openai/CLIP; transformers
    `modeling_clip.py` and `modeling_siglip.py`).

    Attributes:
      class_embedding, pre_layernorm: None where the configuration says so.
      last: LN1, keys and queries of the block after the features; None where there is no such
        block.
      head: the attention pooling, or None.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width, patch = config.width, config.patch_size
        normal = nnx.initializers.normal(width**-0.5)
        self.config = config
        self.class_embedding = (
            nnx.Param(normal(rngs.params(), (width,)), out_sharding=(None,))
            if config.cls_token
            else None
        )
        self.patch_embedding = PatchEmbedding(patch, width, bias=config.patch_bias, rngs=rngs)
        self.position_embedding = nnx.Param(
            normal(rngs.params(), (config.num_patches + config.num_prefix, width)),
            out_sharding=(None, "embed"),
        )
        self.pre_layernorm = LayerNorm(width, config.layer_norm_eps) if config.pre_norm else None
        ends_before_last = config.feature_layer == -2
        self.layers = stack(
            lambda rngs: VisionLayer(config, rngs=rngs), config.num_layers - ends_before_last, rngs
        )
        self.last = LastBlock(config, rngs=rngs) if ends_before_last else None
        self.head = PoolingHead(config, rngs=rngs) if config.pooling_head else None

    def __call__(
        self,
        pixels: jax.Array,
        *,
        feature_layer: bool = False,
        first_layer: bool = False,
        watch: Watch | None = None,
        stages: tuple[Stage, ...] | None = None,
    ) -> VisionFeatures:
        """Encodes normalised images.

        Args:
          pixels: [B, S, S, 3] in the compute dtype. S is `config.image_size`; for a smaller image
            the position embedding is shrunk bilinearly, the usual way to run a ViT at another size.
          feature_layer: whether query and keys of the block that made the features are wanted too:
            one more buffer, and two products more.
          first_layer: whether those of the first block are wanted too, of a tower with CLS token.
          watch: a running score of the patches, see `run_layers`; None without one.
          stages: merges inside the tower, in place of the three above; see `run_stages`.
        """
        pixels = constrain(pixels, "images", None, None, None)
        x = self.patch_embedding(pixels)
        positions = self._positions(x.shape[1])
        if self.class_embedding is not None:
            cls = jnp.broadcast_to(
                self.class_embedding[...].astype(pixels.dtype), (len(pixels), 1, self.config.width)
            )
            x = jnp.concatenate([cls, x], axis=1)
        x = x + positions.astype(pixels.dtype)
        x = x if self.pre_layernorm is None else self.pre_layernorm(x)
        x = constrain(x, "images", None, None)
        if stages is not None:
            return self._merged(x, stages)
        outputs = run_layers(
            self.layers,
            x,
            num_layers=self.config.num_layers,
            first_patch=self.config.num_prefix,
            remember=feature_layer or self.last is None,
            watch=watch,
        )
        features = self._of_last_layers(outputs)
        if not first_layer:
            return features
        queries, keys = self._queries_and_keys(0, x)
        return features._replace(first_query=queries[:, 0], first_keys=keys)

    def _of_last_layers(self, outputs: LayerOutputs) -> VisionFeatures:
        """The features, with the last block's query and keys."""
        hidden, watched = outputs.hidden, outputs.watched
        if outputs.before_last is None:
            assert self.last is not None  # else the last layer's input is remembered
            return VisionFeatures(hidden, *self.last(hidden), watched=watched)
        queries, keys = self._queries_and_keys(-1, outputs.before_last)
        if self.last is None:
            return VisionFeatures(hidden, queries, keys, feature_keys=keys, watched=watched)
        return VisionFeatures(hidden, *self.last(hidden), queries[:, 0], keys, watched)

    def _queries_and_keys(self, index: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of one of the layers, whose input is x [B, P+N, D]."""
        graphdef, weights = nnx.split(self.layers)
        layer = nnx.merge(graphdef, jax.tree.map(lambda stacked: stacked[index], weights))
        queries, keys = layer.self_attn.queries_and_keys(layer.normalised(x))
        return queries, keys

    def _merged(self, x: jax.Array, stages: tuple[Stage, ...]) -> VisionFeatures:
        """The features of a tower that merges on the way; it has a CLS token."""
        assert self.last is not None
        hidden, groups = run_stages(self.layers, x, stages, num_heads=self.config.num_heads)
        return VisionFeatures(hidden, *self.last(hidden), groups=groups)

    def _positions(self, num_patches: int) -> jax.Array:
        """The position embedding [P + num_patches, D], resized where the image is not full size."""
        positions = self.position_embedding[...]
        if num_patches == self.config.num_patches:
            return positions
        prefix = self.config.num_prefix
        grid, side = self.config.grid, math.isqrt(num_patches)
        patches = positions[prefix:].reshape(grid, grid, -1)
        patches = jax.image.resize(patches, (side, side, patches.shape[-1]), "bilinear")
        return jnp.concatenate([positions[:prefix], patches.reshape(num_patches, -1)])


class PatchEmbedding(nnx.Module):
    """Cuts an image into patches and projects each: a convolution of stride `patch`."""

    def __init__(self, patch: int, width: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        kernel = nnx.initializers.normal(0.02)(rngs.params(), (patch, patch, 3, width))
        self.kernel = nnx.Param(kernel, out_sharding=(None, None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros((width,)), out_sharding=("embed",)) if bias else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, N, D], patches in raster order; the last S mod `patch` rows and
        columns are not seen."""
        patch, _, _, width = self.kernel.shape
        batch, side = pixels.shape[0], pixels.shape[1] // patch
        pixels = pixels[:, : side * patch, : side * patch]
        x = pixels.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        x = x.reshape(batch, side * side, patch * patch * 3)
        x = x @ self.kernel[...].astype(x.dtype).reshape(-1, width)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class VisionLayer(nnx.Module):
    """A pre-norm transformer block without causal mask."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = LayerNorm(config.width, config.layer_norm_eps)
        self.self_attn = VisionAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = VisionMLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, key_bias: jax.Array | None = None) -> jax.Array:
        """[B, N+1, D], for `attend` [B, N+1] -> [B, N+1, D]."""
        return self.after_attention(self.attended(x, key_bias))

    def attended(self, x: jax.Array, key_bias: jax.Array | None = None) -> jax.Array:
        """The first half of the block: x and its attention."""
        return x + self.self_attn(self.layer_norm1(x), key_bias)

    def after_attention(self, x: jax.Array) -> jax.Array:
        """The second half of the block: x and its MLP."""
        return x + self.mlp(self.layer_norm2(x))

    def normalised(self, x: jax.Array) -> jax.Array:
        """What attention sees of x [B, N+1, D], float32."""
        return self.layer_norm1(x.astype(jnp.float32))


class VisionAttention(nnx.Module):
    """Multi-head self-attention, all projections with bias."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.num_heads = config.num_heads
        self.cls_token = config.cls_token
        self.q_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)
        self.k_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)
        self.v_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)
        self.out_proj = Linear(width, width, (None, "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, key_bias: jax.Array | None = None) -> jax.Array:
        """[B, N+1, D], for `attend` [B, N+1] -> [B, N+1, D]."""
        batch, length, width = x.shape
        padded = padded_length(length, x.dtype, width // self.num_heads)
        segment_ids = None
        if padded > length and key_bias is None:
            # Before the projections: after them it would copy queries, keys, values and the result.
            x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0)))
            segment_ids = jnp.broadcast_to(
                (jnp.arange(padded) < length).astype(jnp.int32), x.shape[:2]
            )
        split = (batch, x.shape[1], self.num_heads, -1)
        q, k, v = (proj(x).reshape(split) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = attend(
            q, k, v, segment_ids=segment_ids, key_bias=key_bias, axes=("images", None, None, None)
        )
        return self.out_proj(attended.reshape(x.shape))[:, :length]

    def queries_and_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [B, 1, D] (of CLS) or [B, N, D], and keys [B, P+N, D], of x [B, P+N, D] float32,
        at highest precision."""
        with jax.default_matmul_precision("highest"):
            queries = self.q_proj(x[:, 0])[:, None] if self.cls_token else self.q_proj(x)
            return queries, self.k_proj(x)


class VisionMLP(nnx.Module):
    """Two linear layers around the tower's activation."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = _activation(config.activation)
        self.fc1 = Linear(config.width, config.mlp_width, ("embed", None), bias=True, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, (None, "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N+1, D] -> [B, N+1, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class LastBlock(nnx.Module):
    """The part of a last block after the features: LN1, keys, and queries as in
    `VisionFeatures`."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.cls_token = config.cls_token
        self.layer_norm1 = LayerNorm(width, config.layer_norm_eps)
        self.q_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)
        self.k_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, P+N, D] -> queries and keys, both float32.

        Float32 at highest precision whatever the tower computes in: rounding here changes the
        number of kept tokens in most images.
        """
        with jax.default_matmul_precision("highest"):
            x = self.layer_norm1(hidden.astype(jnp.float32))
            queries = self.q_proj(x[:, 0])[:, None] if self.cls_token else self.q_proj(x)
            return queries, self.k_proj(x)


class PoolingHead(nnx.Module):
    """The part of SigLIP's attention pooling that weighs patches (`SiglipMultiheadAttentionPooling
    Head`): the final LayerNorm, a learnt probe, and the projections of query and keys."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.num_heads = config.num_heads
        self.layer_norm = LayerNorm(width, config.layer_norm_eps)
        self.probe = nnx.Param(
            nnx.initializers.normal(width**-0.5)(rngs.params(), (width,)), out_sharding=(None,)
        )
        self.q_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)
        self.k_proj = Linear(width, width, ("embed", None), bias=True, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """The probe's attention to hidden [B, N, D], mean over heads: [B, N] float32."""
        with jax.default_matmul_precision("highest"):
            keys = self.k_proj(self.layer_norm(hidden.astype(jnp.float32)))
            query = self.q_proj(self.probe[...][None].astype(jnp.float32))
            return mean_query_attention(query[None], keys, self.num_heads)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's activation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU; `jax.nn.gelu` alone would be the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's tanh form, SigLIP's activation."""
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def _activation(name: str):  # type: ignore[no-untyped-def]  # jax.nn activations are untyped
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"unknown vision activation {name!r}; expected one of {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]

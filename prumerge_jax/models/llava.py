"""LLaVA assembled: vision tower, projector, decoder.

The three stages are separate on purpose. Token reduction happens between the tower and the
projector, and packing between the projector and the decoder; both are outside the model.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax import prumerge, reductions, sharding
from prumerge_jax.models import tuning
from prumerge_jax.models.config import NEWLINE, LlavaConfig, VisionConfig
from prumerge_jax.models.frames import FrameForm, pool_evidence, with_slots
from prumerge_jax.models.layers import AdapterConfig, Linear
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.patch_attention import substitute_attention
from prumerge_jax.models.quantisation import Format
from prumerge_jax.models.tower_layers import head_attention
from prumerge_jax.models.vision_tower import VisionFeatures, VisionTower, gelu


class LlavaModel(nnx.Module):
    """The weights of a LLaVA (arXiv 2310.03744) or a relative, and its stages.

    Attributes:
      vision: the tower; of images where videos have another.
      video_tower: the tower of videos, of the same shape (Video-LLaVA), or None.
      image_newline: [D], what ends a row of an image's tokens, in the decoder's width, or None.
    """

    def __init__(
        self,
        config: LlavaConfig,
        *,
        adapter: AdapterConfig | None = None,
        quantize: Format | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.vision = VisionTower(config.vision, rngs=rngs)
        self.video_tower = VisionTower(config.vision, rngs=rngs) if config.video_tower else None
        self.projector = Projector(
            config.projector, config.vision.width, config.text.width, rngs=rngs
        )
        self.decoder = Llama(config.text, adapter=adapter, quantize=quantize, rngs=rngs)
        self.image_newline = (
            nnx.Param(
                nnx.initializers.normal(config.text.width**-0.5)(
                    rngs.params(), (config.text.width,)
                ),
                out_sharding=(None,),
            )
            if config.image_newline
            else None
        )

    def tower(self, *, is_video: bool) -> VisionTower:
        """The tower that sees images, or videos."""
        return self.video_tower if is_video and self.video_tower is not None else self.vision

    def embed_rows(
        self,
        ids: jax.Array,
        visual_tokens: jax.Array,
        visual_index: jax.Array,
        visual_weight: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's input: text embeddings with projected visual tokens put in their places.

        Args:
          ids: [rows, T] int32, any value where a visual token goes.
          visual_tokens: [B, R, Dv], reduced and not yet projected; its dtype is the compute dtype.
            May have one column more, which `key_bias` reads.
          visual_index: [rows, T] int32, b * R + r of the visual token at this position, -1 for
            text and padding, -2 for a newline, of models that have one. [rows, T, K] where a token
            is interpolated from K projected ones; the first says what is at the position.
          visual_weight: [rows, T, K] float32, their weights.

        Returns:
          [rows, T, D].
        """
        text = self.decoder.embed(ids, visual_tokens.dtype)
        # Tokens are gathered before projection, so that slots no row uses cost nothing.
        features = visual_tokens[..., : self.vision.config.width]
        visual = self.projector(gather_visual_tokens(features, visual_index))
        if visual_weight is not None:
            visual = (visual * visual_weight[..., None].astype(visual.dtype)).sum(axis=2)
            visual_index = visual_index[..., 0]
        x = jnp.where(visual_index[..., None] >= 0, visual, text)
        if self.image_newline is None:
            return x
        newline = self.image_newline[...].astype(x.dtype)
        return jnp.where(visual_index[..., None] == NEWLINE, newline, x)

    def key_bias(self, visual_tokens: jax.Array, visual_index: jax.Array) -> jax.Array | None:
        """What attention adds to the logits of visual tokens, [rows, T] float32: the logarithm of
        the patches in each, 0 for text. None where tokens carry none.

        Arguments as in `embed_rows`.
        """
        width = self.vision.config.width
        if visual_tokens.shape[-1] == width:
            return None
        if visual_index.ndim == 3:
            visual_index = visual_index[..., 0]
        return gather_visual_tokens(visual_tokens[..., width:], visual_index)[..., 0].astype(
            jnp.float32
        )


def encode_images(
    vision: VisionTower,
    pixels: jax.Array,
    reduction: reductions.ReductionLike,
    *,
    dtype: jnp.dtype = jnp.float32,
    projector: "Projector | None" = None,
    question: tuple[jax.Array, jax.Array] | None = None,
    present: jax.Array | None = None,
    first_frame: jax.Array | None = None,
    form: FrameForm | None = None,
    slots: int | None = None,
) -> prumerge.VisualTokens:
    """Pixels to reduced visual tokens, one compiled step of fixed shape.

    Args:
      vision: the tower.
      pixels: [B, S, S, 3] uint8, resized and cropped or padded.
      reduction: what happens to the patch features; static under `jax.jit`.
      dtype: compute dtype of the tower and dtype of the tokens.
      projector: for reductions that look at projected patches.
      question: for reductions that read it, see `embed_question`.
      present: [B, N] bool, patches that the reduction may see; None for all.
      first_frame: see `reductions.Evidence`.
      form: what is special about frames; None for images.
      slots: token slots per image, at least the reduction's capacity, which None means.

    Raises:
      ValueError: the reduction needs evidence that is not there.
    """
    reduction = reductions.as_reduction(reduction)
    evidence = gather_evidence(
        vision,
        pixels,
        reduction,
        dtype=dtype,
        projector=projector,
        question=question,
        present=present,
        first_frame=first_frame,
        form=form,
    )
    visual = reductions.reduce(evidence, reduction)
    if slots is None:
        return visual
    return with_slots(visual, slots, evidence.cls if form is not None and form.cls else None)


_OF_CLS = frozenset(
    [
        "cls",
        "head_attention",
        "feature_attention",
        "last_head_attention",
        "first_attention",
        "groups",
    ]
)
"""Fields of the evidence that a tower without CLS token does not have."""


def gather_evidence(
    vision: VisionTower,
    pixels: jax.Array,
    reduction: reductions.Reduction,
    *,
    dtype: jnp.dtype,
    projector: "Projector | None" = None,
    question: tuple[jax.Array, jax.Array] | None = None,
    present: jax.Array | None = None,
    first_frame: jax.Array | None = None,
    form: FrameForm | None = None,
) -> reductions.Evidence:
    """What the tower shows of images [B, S, S, 3] uint8, as far as a reduction, or the form of
    frames, needs it. Arguments as in `encode_images`."""
    form, config = form or FrameForm(), vision.config
    needs = reduction.needs | ({"cls"} if form.cls else frozenset())
    if without_cls := sorted(needs & _OF_CLS if not config.cls_token else ()):
        raise ValueError(
            f"the reduction reads {without_cls[0]!r}, which a tower without CLS token does not "
            f"have; its patches are weighed by {config.attention!r}"
        )
    features = vision(
        normalize_pixels(pixels, config).astype(dtype),
        feature_layer=bool(needs & {"head_attention", "feature_keys", "feature_attention"}),
        first_layer="first_attention" in needs,
        watch=reduction.watch if "watched" in needs else None,
        stages=_stages(config, reduction, pixels.shape[1]),
    )
    first = config.num_prefix
    hidden = features.hidden[:, first:]
    of_layers = _of_layers(features, needs, config)
    evidence = reductions.Evidence(
        hidden,
        features.keys[:, first:],
        patch_attention(vision, features),
        cls=features.hidden[:, 0] if "cls" in needs else None,
        **of_layers,
        watched=features.watched,
        groups=features.groups,
        projected=None if projector is None or "projected" not in needs else projector(hidden),
        question=question,
        present=present,
        first_frame=first_frame,
    )
    return evidence if form.pooled is None else pool_evidence(evidence, form.pooled, projector)


def _of_layers(
    features: VisionFeatures, needs: frozenset[str], config: VisionConfig
) -> dict[str, jax.Array]:
    """The fields of the evidence that are keys and attention of a layer as the tower has them."""
    found: dict[str, jax.Array] = {}
    heads = config.num_heads
    if features.feature_keys is not None:
        found["feature_keys"] = features.feature_keys[:, config.num_prefix :]
    if features.feature_query is not None and features.feature_keys is not None:
        query_and_keys = features.feature_query, features.feature_keys
        found["head_attention"] = head_attention(*query_and_keys, heads)
        found["feature_attention"] = prumerge.cls_attention(*query_and_keys)
    if "last_head_attention" in needs:
        found["last_head_attention"] = head_attention(features.queries[:, 0], features.keys, heads)
    if features.first_query is not None and features.first_keys is not None:
        in_heads = head_attention(features.first_query, features.first_keys, heads)
        found["first_attention"] = in_heads.sum(1)
    return found


def _stages(
    vision: VisionConfig, reduction: reductions.Reduction, side: int
) -> tuple[reductions.Stage, ...] | None:
    """The merges inside the tower on images of this side; None where nobody asks for any."""
    if "groups" not in reduction.needs:
        return None
    return reduction.stages(vision.num_layers - 1, (side // vision.patch_size) ** 2)


def embed_question(
    decoder: Llama, ids: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array] | None:
    """The question of every image as a reduction reads it: embeddings [B, M, D], which are real.

    Args:
      decoder: whose embedding is used.
      ids: [B, M] int32, -1 beyond a question's tokens; None without questions.
      dtype: compute dtype.
    """
    if ids is None:
        return None
    return decoder.embed(jnp.maximum(ids, 0), dtype), ids >= 0


def patch_attention(vision: VisionTower, features: VisionFeatures) -> jax.Array:
    """How important each patch is, [B, N] float32, by the tower's `config.attention`."""
    config = vision.config
    if config.attention == "cls":
        return prumerge.cls_attention(features.queries[:, 0], features.keys)
    if config.attention == "map":
        assert vision.head is not None  # VisionConfig sees to it
        return vision.head(features.hidden)
    return substitute_attention(config.attention, features.queries, features.keys, config.num_heads)


def gather_visual_tokens(visual_tokens: jax.Array, visual_index: jax.Array) -> jax.Array:
    """Visual tokens in the order of the rows.

    On a mesh every data shard reads from its own images alone, without communication: the planner
    puts a sequence on the shard of its images (`packing.pack_window` with `shards`).

    Args:
      visual_tokens: [B, R, Dv].
      visual_index: [rows, T] int32, b * R + r, -1 for none.

    Returns:
      [rows, T, Dv]; zero where there is none, so that whatever is in unused slots reaches neither
      values nor gradients. NaN where an index is on another shard: a wrong plan, made visible.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _gather_on_shard(visual_tokens, visual_index, 0)
    axes = sharding.RULES["batch"]

    def on_shard(visual_tokens: jax.Array, visual_index: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(axes) * visual_tokens.shape[0] * visual_tokens.shape[1]
        return _gather_on_shard(visual_tokens, visual_index, first)

    spec = sharding.logical_spec("batch")
    return jax.shard_map(on_shard, in_specs=(spec, spec), out_specs=spec)(
        visual_tokens, visual_index
    )


def _gather_on_shard(
    visual_tokens: jax.Array, visual_index: jax.Array, first: jax.Array | int
) -> jax.Array:
    """`gather_visual_tokens` for a block of images whose first slot has the index `first`."""
    flat = visual_tokens.reshape(-1, visual_tokens.shape[-1])
    at = visual_index - first
    is_here = (at >= 0) & (at < len(flat))
    elsewhere = jnp.where(visual_index >= 0, jnp.nan, 0).astype(flat.dtype)
    return jnp.where(is_here[..., None], flat[jnp.where(is_here, at, 0)], elsewhere[..., None])


def normalize_pixels(pixels: jax.Array, config: VisionConfig) -> jax.Array:
    """uint8 [..., 3] -> float32, scaled to [0, 1], then mean and standard deviation per channel.

    Scaled levels have the bits of the reference's numpy code, which divides in float64 before it
    rounds: a level times the first bits of 1 / 255 is exact in float32, and the sum with the rest
    rounds once. The division by the deviation rounds as the platform does.
    """
    level = pixels.astype(jnp.float32)
    unit = level * np.float32(257 / 2**16) + level * np.float32(1 / (255 * 2**16))
    return (unit - jnp.asarray(config.pixel_mean)) / jnp.asarray(config.pixel_std)


class Projector(nnx.Module):
    """Visual width to text width: `linear`, `mlpNx_gelu` or `identity` (LLaVA's builder.py).

    The layers of an MLP are named by their index in the original Sequential: linear_0, linear_2...
    """

    def __init__(self, kind: str, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> None:
        self.depth = projector_depth(kind)
        for layer in range(self.depth):
            width = d_in if layer == 0 else d_out
            linear = Linear(width, d_out, (None, "embed"), bias=True, rngs=rngs)
            setattr(self, f"linear_{2 * layer}", linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., Dv] -> [..., D]."""
        for layer in range(self.depth):
            x = getattr(self, f"linear_{2 * layer}")(x if layer == 0 else gelu(x))
        return x


def projector_depth(kind: str) -> int:
    """The number of linear layers of a projector.

    Raises:
      ValueError: an unknown kind.
    """
    if kind == "identity":
        return 0
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if not match:
        raise ValueError(
            f"unknown projector {kind!r}; expected 'linear', 'identity' or 'mlpNx_gelu'"
        )
    return int(match[1])


def abstract_model(
    config: LlavaConfig, adapter: AdapterConfig | None = None, quantize: Format | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes, dtypes and logical axes of its weights; no arrays."""
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(
            lambda: LlavaModel(config, adapter=adapter, quantize=quantize, rngs=nnx.Rngs(0))
        )
    return nnx.split(model)


def inference_layout(graphdef: nnx.GraphDef, state: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The same model with the decoder's weights as `tuning.Tuning.layers` and `kernels` say.

    Where XLA copies a layer's weights out of a stack, or rearranges them, it does so at every step
    of decoding, which does little else than read weights.

    Args:
      graphdef, state: a split `LlavaModel`; weights that are laid out anew are deleted, one after
        the other.
    """
    model = nnx.merge(graphdef, state)
    if tuning.current().layers == "list":
        _take_apart(model.decoder)
    for linear in _out_first(model.decoder):
        held = linear.put_out_first()
        jax.block_until_ready(nnx.state(linear))
        for array in held:
            array.delete()
    return nnx.split(model)


def abstract_in_stack(
    config: LlavaConfig, quantize: Format | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """`abstract_model` in `inference_layout`, where that keeps the layers in a stack."""

    def create() -> LlavaModel:
        model = LlavaModel(config, quantize=quantize, rngs=nnx.Rngs(0))
        for linear in _out_first(model.decoder):
            linear.put_out_first()
        return model

    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(create))


def _out_first(decoder: Llama) -> list[Linear]:
    """The decoder's linear layers whose kernels inference keeps as [d_out, d_in]."""
    kernels = tuning.current().kernels
    linears = [each for _, each in nnx.iter_modules(decoder) if isinstance(each, Linear)]
    if kernels == "wide_out_first":
        return [each for each in linears if each.quantize is None and each.is_wide]
    return linears if kernels == "out_first" else []


def _take_apart(decoder: Llama) -> None:
    """Makes a list of the decoder's stacked layers."""
    layer, stacked = nnx.split(decoder.layers)
    apart: list[dict[Any, Any]] = [{} for _ in range(decoder.config.num_layers)]
    for path, weight in nnx.to_flat_state(stacked):
        for index, weights in enumerate(apart):
            weights[path] = weight.replace(weight[...][index])
        jax.block_until_ready([weights[path][...] for weights in apart])
        weight[...].delete()
    with nnx.use_eager_sharding(False):
        merged = [nnx.merge(layer, nnx.from_flat_state(weights)) for weights in apart]
        decoder.layers = nnx.List(merged)


def random_model(
    config: LlavaConfig, seed: int, adapter: AdapterConfig | None = None
) -> LlavaModel:
    """A model with random float32 weights on the default device."""
    with nnx.use_eager_sharding(False):
        return LlavaModel(config, adapter=adapter, rngs=nnx.Rngs(seed))

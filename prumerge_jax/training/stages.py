"""What differs between training stages: the module, its loss, its micro-batches.

Everything is built from the configuration alone, without a weight or a sample, so that a recipe can
be checked and compiled ahead of time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import reductions
from prumerge_jax.digits.contrastive import (
    CaptionBatch,
    ContrastiveConfig,
    contrastive_loss,
    contrastive_template,
    sharpened,
)
from prumerge_jax.digits.patch_dropout import PatchDropout, drop_patches
from prumerge_jax.models.attention import default_implementation
from prumerge_jax.models.clip import ClipVision
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.llava import LlavaModel, encode_images
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import logical_spec
from prumerge_jax.training.next_token import RowBatch, next_token_loss
from prumerge_jax.training.parameters import Shapes, Template, Weights, trained_paths
from prumerge_jax.training.step import Loss


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One training stage.

    Attributes:
      template: the module whose weights the loss takes.
      loss: of one micro-batch.
      learning_rates: peak rate of every trained weight, by path.
      dtype: what the stage computes in; also the dtype of the frozen weights.
      finished: the trained weights as the stage leaves them to the next one.
    """

    template: Template[Any]
    loss: Loss
    learning_rates: Mapping[str, float]
    dtype: jnp.dtype
    finished: Callable[[Weights], Weights]

    def shapes(self) -> Shapes:
        """All weights as the run holds them: trained ones float32, frozen ones in `dtype`."""
        return {
            path: shape
            if path in self.learning_rates
            else jax.ShapeDtypeStruct(shape.shape, self.dtype)
            for path, shape in self.template.shapes().items()
        }

    def trained(self) -> Shapes:
        """The weights that train."""
        return {path: shape for path, shape in self.shapes().items() if path in self.learning_rates}


def model_config(values: ml_collections.ConfigDict) -> LlavaConfig:
    """The model sizes that `config.model` spells out."""
    fields = values.to_dict()
    vision, text = VisionConfig(**fields.pop("vision")), TextConfig(**fields.pop("text"))
    return LlavaConfig(vision=vision, text=text, **fields)


def adapter_config(config: ml_collections.ConfigDict) -> AdapterConfig | None:
    """The adapters of a run, None where `config.adapter` is None."""
    return None if config.adapter is None else AdapterConfig(**config.adapter)


def run_reduction(config: ml_collections.ConfigDict, vision: VisionConfig) -> Reduction:
    """The token reduction of a run.

    Raises:
      ValueError: `config.reduction` is not valid, or it resizes images, which only inference does.
    """
    reduction = reductions.parse(config.reduction)
    if reduction.image_size(vision.image_size, vision.patch_size) != vision.image_size:
        raise ValueError(
            f"reduction {config.reduction!r} resizes images, which training does not; "
            "train with another, or on a model of that image size"
        )
    return reduction


def patch_dropout(config: ml_collections.ConfigDict) -> PatchDropout | None:
    """The patch dropout of a run, if it has one."""
    return None if config.patch_dropout is None else PatchDropout(**config.patch_dropout)


def llava_template(model: LlavaConfig, adapter: AdapterConfig | None) -> Template[LlavaModel]:
    """The template of a `LlavaModel`."""
    return Template.of(lambda seed: LlavaModel(model, adapter=adapter, rngs=nnx.Rngs(seed)))


def make_stage(config: ml_collections.ConfigDict, model: LlavaConfig) -> Stage:
    """The stage that `config.objective` names.

    Raises:
      ValueError: there is no such objective, or the configuration contradicts itself.
    """
    stages = {"next_token": _next_token, "contrastive": _contrastive}
    if config.objective not in stages:
        raise ValueError(f"objective is {config.objective!r}; expected one of {sorted(stages)}")
    return stages[config.objective](config, model)


def _next_token(config: ml_collections.ConfigDict, model: LlavaConfig) -> Stage:
    dtype = jnp.dtype(config.dtype)
    template = llava_template(model, adapter_config(config))
    attention = default_implementation(dtype, model.text.head_dim)
    capacity = visual_capacity(config, model.vision)
    if capacity > config.max_length:
        raise ValueError(
            f"an image may have {capacity} visual tokens, a row has max_length "
            f"{config.max_length}; nothing would be left of its sample"
        )
    if config.max_length > model.text.max_positions:
        raise ValueError(
            f"max_length is {config.max_length}, the model has {model.text.max_positions} positions"
        )

    def loss(weights: Weights, batch: RowBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(
            template.merge(weights),
            batch,
            dropout_key=key,
            remat=config.remat,
            implementation=attention,
        )

    rates = trained_paths(template.variables, config.learning_rates)
    return Stage(template, loss, rates, dtype, finished=lambda trained: trained)


def abstract_rows(config: ml_collections.ConfigDict, model: LlavaConfig, shards: int) -> RowBatch:
    """A micro-batch of a next-token stage without its values, for compiling ahead of time.

    Args:
      config: of the run.
      model: sizes.
      shards: data shards of the mesh.
    """
    rows = config.run.rows_per_shard * shards
    row = jax.ShapeDtypeStruct((rows, config.max_length), jnp.int32)
    tokens = (config.batch_size, visual_capacity(config, model.vision), model.vision.width)
    visual = jax.ShapeDtypeStruct(tokens, jnp.dtype(config.dtype))
    return RowBatch(row, row, row, row, row, visual)


def visual_capacity(config: ml_collections.ConfigDict, vision: VisionConfig) -> int:
    """R: visual token slots per image; 1 where the stage has no images."""
    if config.reduction is None:
        return 1
    return run_reduction(config, vision).capacity_for(vision.num_patches)


class ImageEncoder:
    """The frozen tower and the token reduction as one compiled function of one shape.

    Args:
      config: of the run.
      vision: the tower's sizes.
      weights: all weights of the run, or their shapes; those of the tower are used.
      mesh: the devices; every image stays on its data shard.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        vision: VisionConfig,
        weights: Weights | Shapes,
        mesh: Mesh,
    ) -> None:
        prefix = "vision."
        template = Template.of(lambda seed: ClipVision(vision, rngs=nnx.Rngs(seed)))
        self._weights = {path: weights[prefix + path] for path in template.variables}
        dtype = jnp.dtype(config.dtype)
        self._encode = jax.jit(
            functools.partial(
                _encode,
                template,
                reduction=run_reduction(config, vision),
                dtype=dtype,
                implementation=default_implementation(dtype, vision.width // vision.num_heads),
                dropout=patch_dropout(config),
            ),
            out_shardings=NamedSharding(mesh, logical_spec("batch")),
        )

    def __call__(self, pixels: jax.Array) -> VisualTokens:
        """[B, S, S, 3] uint8 -> visual tokens, dispatched and not waited for."""
        return self._encode(self._weights, pixels)

    def lower(self, pixels: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """The function for pixels of this shape, where the weights are shapes too."""
        return self._encode.lower(self._weights, pixels)


def _encode(
    template: Template[ClipVision],
    weights: Weights,
    pixels: jax.Array,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
    implementation: str,
    dropout: PatchDropout | None,
) -> VisualTokens:
    vision = template.merge(weights)
    visual = encode_images(vision, pixels, reduction, dtype=dtype, implementation=implementation)
    return visual if dropout is None else drop_patches(visual, pixels, dropout)


class NoImages:
    """Stands in for `ImageEncoder` where a stage has text alone: one unused slot per sample."""

    def __init__(self, config: ml_collections.ConfigDict, vision: VisionConfig, mesh: Mesh) -> None:
        size = config.batch_size
        none = jnp.zeros((size,), jnp.int32)
        tokens = jnp.zeros((size, 1, vision.width), jnp.dtype(config.dtype))
        self._none = jax.device_put(
            VisualTokens(tokens, none, jnp.full((size, 1), -1, jnp.int32), none),
            NamedSharding(mesh, logical_spec("batch")),
        )

    def __call__(self, pixels: jax.Array) -> VisualTokens:
        """[B, …] -> no visual tokens."""
        return self._none


def _contrastive(config: ml_collections.ConfigDict, model: LlavaConfig) -> Stage:
    if jnp.dtype(config.dtype) != jnp.float32:
        raise ValueError(f"the contrastive stage computes in float32, not in {config.dtype!r}")
    options = contrastive_config(config, model)
    template = contrastive_template(model.vision, options)

    def loss(weights: Weights, batch: CaptionBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return contrastive_loss(weights, batch, vision=model.vision, config=options)

    rates = trained_paths(template.variables, config.learning_rates)
    finished = functools.partial(
        sharpened, pooling_temperature=config.contrastive.pooling_temperature
    )
    return Stage(template, loss, rates, jnp.dtype(jnp.float32), finished)


def contrastive_config(config: ml_collections.ConfigDict, model: LlavaConfig) -> ContrastiveConfig:
    """The parts that only the contrastive stage has; its text tower has the model's vocabulary."""
    options = config.contrastive
    text = TextConfig(**options.text, vocab_size=model.text.vocab_size)
    return ContrastiveConfig(text, options.width, options.group, options.temperature)

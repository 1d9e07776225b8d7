"""Next-token prediction on packed rows, with or without images: the loss and its objective."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import reductions
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.engine.encoding import frame_form, interpolates, token_slots
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.llava import LlavaModel, encode_images
from prumerge_jax.models.vision_tower import VisionTower
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import constrain, logical_spec, placed
from prumerge_jax.training.batches import BatchPacker, RowBatch, RowShape
from prumerge_jax.training.config import ConfigError, TrainConfig
from prumerge_jax.training.crops import CropCapacity, CropPacker
from prumerge_jax.training.inputs import TrainingSource, open_conversations
from prumerge_jax.training.objectives.registry import Objective, Packer
from prumerge_jax.training.parts import crops_at_a_time
from prumerge_jax.training.weights import (
    AbstractModule,
    Shapes,
    Weights,
    llava_module,
    trained_paths,
)

LOGIT_POSITIONS = 256
"""Positions of a row whose logits exist at a time; [2048, 32000] float32 would be 262 MB."""


def next_token_loss(
    model: LlavaModel,
    batch: RowBatch,
    *,
    dropout_key: jax.Array | None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in nats, summed over the target tokens, and their number; both float32.

    Args:
      model: its tower is not run.
      batch: packed rows; each segment sees only itself.
      dropout_key: key of the adapters' dropout; None for none.
      remat: see `remat.rematerialise`.
    """
    hidden = hidden_states(model, batch, dropout_key=dropout_key, remat=remat)

    logits = logits_of(model.decoder, hidden.dtype)

    def loss(targets: jax.Array, hidden: jax.Array) -> jax.Array:
        return cross_entropy(logits(hidden), targets)

    return sum_over_targets(loss, batch.targets, hidden)


def hidden_states(
    model: LlavaModel, batch: RowBatch, *, dropout_key: jax.Array | None, remat: str
) -> jax.Array:
    """Final hidden states [rows, T, D]; arguments as in `next_token_loss`."""
    x = model.embed_rows(batch.ids, batch.visual_tokens, batch.visual_index, batch.visual_weight)
    return model.decoder(
        constrain(x, "batch", None, None),
        batch.positions,
        batch.segment_ids,
        key_bias=model.key_bias(batch.visual_tokens, batch.visual_index),
        remat=remat,
        dropout_key=dropout_key,
    )


def logits_of(decoder: Llama, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """The function of hidden states [rows, T, D] to next-token logits [rows, T, V] float32.

    On a mesh the head is gathered once for all its calls: XLA does not take a gather out of a loop.
    """
    weight = decoder.head_weight(dtype)
    return lambda hidden: constrain(decoder.logits(hidden, weight), "batch", None, "vocab")


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p [rows, T] of the targets [rows, T]; any finite value where there is none."""
    # A comparison instead of a gather: on a sharded vocabulary a gather would collect it.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    chosen = jnp.where(is_target, logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def sum_over_targets(
    loss: Callable[..., jax.Array], targets: jax.Array, *hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of a loss over the targets, and their number; both float32.

    Args:
      loss: (targets, *hidden) of some columns -> loss of every position; called for a chunk of
        columns at a time and again in the backward pass, so that few logits exist at once.
      targets: [rows, T] int32, `IGNORE` where there is none.
      *hidden: each [rows, T, D].
    """
    rows, length = targets.shape
    chunk = min(LOGIT_POSITIONS, length)
    pad = -length % chunk

    def chunks(x: jax.Array, padding: int) -> jax.Array:
        widths = ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, widths, constant_values=padding)
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jnp.where(part[0] != IGNORE, loss(*part), 0).sum(), None

    parts = (chunks(targets, IGNORE), *(chunks(x, 0) for x in hidden))
    total, _ = jax.lax.scan(add, jnp.zeros(()), parts)
    return total, (targets != IGNORE).sum(dtype=jnp.float32)


def make(config: TrainConfig) -> Objective:
    """The objective of a LLaVA.

    Raises:
      ValueError: the row length does not fit the model or its images.
    """
    model = config.sizes
    dtype = jnp.dtype(config.dtype)
    module = llava_module(model, config.adapter, config.quantize)
    check_row_length(config, visual_capacity(config))

    def loss(weights: Weights, batch: RowBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(
            module.merge(weights),
            batch,
            dropout_key=key,
            remat=config.remat,
        )

    def open_source(tokenizer: Tokenizer) -> TrainingSource:
        share = visual_capacity(config) / model.vision.num_patches
        return open_conversations(config, tokenizer, fewest_visual_tokens(config), share)

    def packer(tokenizer: Tokenizer, frozen: Weights, mesh: Mesh, total_steps: int) -> Packer:
        if config.shows_crops:
            return crop_packer(config, frozen, mesh)
        return BatchPacker(
            ImageEncoder(config, frozen, mesh),
            num_patches=model.vision.num_patches,
            shape=row_shape(config, mesh),
            mesh=mesh,
        )

    rates = trained_paths(module.variables, config.learning_rates)
    return Objective(module, loss, rates, dtype, open_source, packer)


def crop_packer(config: TrainConfig, weights: Weights, mesh: Mesh) -> CropPacker:
    """The packer of a model whose images are cut into tiles, or that is shown videos.

    Args:
      config: configuration of the run, model sizes included.
      weights: all weights of the run; those of its towers are used.
      mesh: the devices.
    """
    model, reduction = config.sizes, crop_reduction(config)
    vision, form = model.vision, frame_form(model, reduction)
    capacity = CropCapacity(
        per_sample=config.room_for_crops,
        side=vision.image_size,
        num_patches=vision.num_patches,
        cls=form is not None and form.cls,
        reduction=reduction,
        interpolates=interpolates(model, reduction),
    )
    encoders = crop_encoders(config, weights, mesh)
    return CropPacker(encoders, capacity=capacity, shape=row_shape(config, mesh), mesh=mesh)


def _kinds_of_crops(config: TrainConfig) -> int:
    """How many encoders `crop_encoders` gives, each with its own room for crops."""
    has_own = config.shows_crops and frame_form(config.sizes, crop_reduction(config)) is not None
    return 2 if has_own else 1


def crop_encoders(
    config: TrainConfig, weights: Weights | Shapes, mesh: Mesh
) -> "list[ImageEncoder]":
    """The encoder of crops of images, and that of frames where the model encodes them otherwise;
    arguments as in `crop_packer`."""
    model, reduction = config.sizes, crop_reduction(config)
    form, reduces = frame_form(model, reduction), reduction.reduces(model.vision.num_patches)
    encode = functools.partial(
        encode_images,
        reduction=reduction,
        dtype=jnp.dtype(config.dtype),
        slots=token_slots(model, reduction),
    )

    def images(tower: VisionTower, pixels: jax.Array, on_image: jax.Array) -> VisualTokens:
        return encode(tower, pixels, present=on_image if reduces else None)

    def videos(tower: VisionTower, pixels: jax.Array, first: jax.Array) -> VisualTokens:
        return encode(
            tower, pixels, first_frame=first if reduction.merges_frames else None, form=form
        )

    encoders = [ImageEncoder(config, weights, mesh, images)]
    if form is not None:
        tower = "video_tower" if model.video_tower else "vision"
        encoders.append(ImageEncoder(config, weights, mesh, videos, tower=tower))
    return encoders


def check_row_length(config: TrainConfig, visual_tokens: int) -> None:
    """Raises ConfigError where a row cannot hold an image, or the model not a row."""
    length, positions = config.row_length, config.sizes.text.max_positions
    if visual_tokens > length:
        raise ConfigError(
            f"an image may have {visual_tokens} visual tokens, a row has max_length {length}; "
            "nothing would be left of its sample"
        )
    if length > positions:
        raise ConfigError(f"max_length is {length}, the model has {positions} positions")


def row_shape(config: TrainConfig, mesh: Mesh) -> RowShape:
    """The shape of the micro-batches of a run on a mesh."""
    rows = config.run.rows_per_shard * mesh.shape["data"] * mesh.shape["fsdp"]
    return RowShape(rows, config.row_length, config.position_ids)


def abstract_rows(config: TrainConfig, shards: int, length: int) -> RowBatch:
    """A micro-batch without its values, for compiling ahead of time.

    Args:
      config: configuration of the run, model sizes included.
      shards: number of data shards of the mesh.
      length: T of its rows.
    """
    row = jax.ShapeDtypeStruct((config.run.rows_per_shard * shards, length), jnp.int32)
    width = config.sizes.vision.width + run_reduction(config).weighs_tokens
    crops = config.batch_size * config.room_for_crops * _kinds_of_crops(config)
    tokens = (crops, visual_capacity(config), width)
    visual = jax.ShapeDtypeStruct(tokens, jnp.dtype(config.dtype))
    return RowBatch(row, row, row, row, row, visual)


def crops_per_part(config: TrainConfig, shards: int) -> int:
    """Crops of all data shards that are encoded at a time."""
    return shards * crops_at_a_time(config.batch_size * config.room_for_crops // shards)


def lower_encoder(
    config: TrainConfig, frozen: Shapes, mesh: Mesh, crops: int
) -> jax.stages.Lowered:
    """The encoder of images, for compiling ahead of time.

    Args:
      config: configuration of the run, model sizes included.
      frozen: shapes of the frozen weights.
      mesh: the devices.
      crops: number of crops on all of them.
    """
    vision, batch = config.sizes.vision, NamedSharding(mesh, logical_spec("batch"))
    side = vision.image_size
    pixels = placed(jax.ShapeDtypeStruct((crops, side, side, 3), jnp.uint8), batch)
    if not config.shows_crops:
        return ImageEncoder(config, frozen, mesh).lower(pixels)
    on_image = placed(jax.ShapeDtypeStruct((crops, vision.num_patches), jnp.bool_), batch)
    return crop_encoders(config, frozen, mesh)[0].lower(pixels, on_image)


def run_reduction(config: TrainConfig) -> Reduction:
    """The token reduction of a run.

    Raises:
      ConfigError: it resizes images, or looks at more than the frozen tower shows, which only
        inference does; or images have several crops, which it does not take.
    """
    reduction, vision = reductions.parse(config.reduction), config.sizes.vision
    try:
        reductions.require_before_decoder(reduction, "training")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if reduction.image_size(vision.image_size, vision.patch_size) != vision.image_size:
        raise ConfigError(
            f"reduction {config.reduction!r} resizes images, which training does not; "
            "train with another, or on a model of that image size"
        )
    refusal = reductions.refusal_of_crops(reduction) if config.sizes.image_grid_pinpoints else None
    if refusal is not None:
        raise ConfigError(refusal)
    if projected := reduction.needs & {"projected", "question"}:
        raise ConfigError(
            f"reduction {config.reduction!r} looks at {' and '.join(sorted(projected))} patches, "
            "which training changes; train with another (divprune:features=hidden does not)"
        )
    return reduction


def visual_capacity(config: TrainConfig) -> int:
    """R: visual token slots per crop."""
    return crop_reduction(config).capacity_for(config.sizes.vision.num_patches)


def crop_reduction(config: TrainConfig) -> Reduction:
    """`run_reduction` as it is applied to each crop of the model's images."""
    return run_reduction(config).for_crops(config.sizes.most_crops)


def fewest_visual_tokens(config: TrainConfig) -> int:
    """Lower bound of the visual tokens per image; a reduction that depends on it may keep one, and
    frames have fewer than images."""
    varies = run_reduction(config).varying or config.shows_crops
    return 1 if varies else visual_capacity(config)


class ImageEncoder:
    """The frozen tower and what is made of its features, as one jitted function of one shape.

    Args:
      config: configuration of the run, model sizes included.
      weights: all weights of the run, or their shapes; those of the tower are used.
      mesh: the devices; every image is kept on its data shard.
      encode: (tower, pixels, ...) -> a tree of arrays [B, ...]; by default the visual tokens of the
        run's reduction.
      tower: `vision`, or the model's other tower.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: Weights | Shapes,
        mesh: Mesh,
        encode: Callable[..., Any] | None = None,
        tower: str = "vision",
    ) -> None:
        prefix = f"{tower}."
        vision = config.sizes.vision
        module = AbstractModule.of(lambda seed: VisionTower(vision, rngs=nnx.Rngs(seed)))
        self._weights = {path: weights[prefix + path] for path in module.variables}
        if encode is None:
            encode = functools.partial(
                encode_images, reduction=run_reduction(config), dtype=jnp.dtype(config.dtype)
            )
        of_tower = encode

        def of_weights(weights: Weights, *crops: jax.Array) -> Any:
            return of_tower(module.merge(weights), *crops)

        self._encode = jax.jit(of_weights, out_shardings=NamedSharding(mesh, logical_spec("batch")))

    def __call__(self, *crops: jax.Array) -> Any:
        """[B, S, S, 3] uint8, and what else `encode` takes [B, ...] -> what it makes of them,
        dispatched and not waited for."""
        return self._encode(self._weights, *crops)

    def lower(self, *crops: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """The function for arguments of these shapes, where the weights are shapes too."""
        return self._encode.lower(self._weights, *crops)

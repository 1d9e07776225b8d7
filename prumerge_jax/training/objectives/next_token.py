"""Next-token prediction on packed rows, with or without images: the loss and its objective."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import reductions
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.llava import LlavaModel, encode_images
from prumerge_jax.models.vision_tower import VisionTower
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import constrain, logical_spec
from prumerge_jax.training.batches import BatchPacker, RowBatch, RowShape
from prumerge_jax.training.config import ConfigError, TrainConfig
from prumerge_jax.training.inputs import TrainingSource, open_conversations
from prumerge_jax.training.objectives.registry import Objective, Packer
from prumerge_jax.training.weights import (
    AbstractModule,
    Shapes,
    Weights,
    llava_module,
    trained_paths,
)

# Positions per row whose logits exist at a time: [2048, 32000] float32 would be 262 MB per row.
_CHUNK = 256


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
      remat: see `layers.rematerialise`.
    """
    x = model.embed_rows(batch.ids, batch.visual_tokens, batch.visual_index)
    hidden = model.decoder(
        constrain(x, "batch", None, None),
        batch.positions,
        batch.segment_ids,
        key_bias=model.key_bias(batch.visual_tokens, batch.visual_index),
        remat=remat,
        dropout_key=dropout_key,
    )
    count = (batch.targets != IGNORE).sum(dtype=jnp.float32)
    return _cross_entropy(model.decoder, hidden, batch.targets), count


def _cross_entropy(decoder: Llama, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over the targets [rows, T] of -log p, computing logits a chunk of columns at a time."""
    rows, length, width = hidden.shape
    chunk = min(_CHUNK, length)
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, chunk, width)
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    targets = targets.reshape(rows, -1, chunk)

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, targets = part
        logits = constrain(decoder.logits(hidden), "batch", None, "vocab")
        # A comparison instead of a gather: on a sharded vocabulary a gather would collect it.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(is_target, logits, 0).sum(-1)
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.where(targets != IGNORE, loss, 0).sum(), None

    parts = (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
    total, _ = jax.lax.scan(add, jnp.zeros(()), parts)
    return total


def make(config: TrainConfig) -> Objective:
    """The objective of a LLaVA.

    Raises:
      ValueError: the row length does not fit the model or its images.
    """
    model = config.sizes
    dtype = jnp.dtype(config.dtype)
    module = llava_module(model, config.adapter)
    capacity, length = visual_capacity(config), config.row_length
    if capacity > length:
        raise ConfigError(
            f"an image may have {capacity} visual tokens, a row has max_length {length}; nothing "
            "would be left of its sample"
        )
    if length > model.text.max_positions:
        raise ConfigError(
            f"max_length is {length}, the model has {model.text.max_positions} positions"
        )

    def loss(weights: Weights, batch: RowBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(
            module.merge(weights),
            batch,
            dropout_key=key,
            remat=config.remat,
        )

    def open_source(tokenizer: Tokenizer) -> TrainingSource:
        return open_conversations(config, tokenizer, fewest_visual_tokens(config))

    def packer(tokenizer: Tokenizer, frozen: Weights, mesh: Mesh) -> Packer:
        rows = config.run.rows_per_shard * mesh.shape["data"] * mesh.shape["fsdp"]
        return BatchPacker(
            ImageEncoder(config, frozen, mesh),
            num_patches=model.vision.num_patches,
            shape=RowShape(rows, length, config.position_ids),
            mesh=mesh,
        )

    rates = trained_paths(module.variables, config.learning_rates)
    return Objective(module, loss, rates, dtype, open_source, packer)


def abstract_rows(config: TrainConfig, shards: int) -> RowBatch:
    """A micro-batch without its values, for compiling ahead of time.

    Args:
      config: configuration of the run, model sizes included.
      shards: number of data shards of the mesh.
    """
    row = jax.ShapeDtypeStruct((config.run.rows_per_shard * shards, config.row_length), jnp.int32)
    width = config.sizes.vision.width + run_reduction(config).weighs_tokens
    tokens = (config.batch_size, visual_capacity(config), width)
    visual = jax.ShapeDtypeStruct(tokens, jnp.dtype(config.dtype))
    return RowBatch(row, row, row, row, row, visual)


def run_reduction(config: TrainConfig) -> Reduction:
    """The token reduction of a run.

    Raises:
      ConfigError: it resizes images, or looks at more than the frozen tower shows, which only
        inference does.
    """
    reduction, vision = reductions.parse(config.reduction), config.sizes.vision
    if reduction.image_size(vision.image_size, vision.patch_size) != vision.image_size:
        raise ConfigError(
            f"reduction {config.reduction!r} resizes images, which training does not; "
            "train with another, or on a model of that image size"
        )
    if projected := reduction.needs & {"projected", "question"}:
        raise ConfigError(
            f"reduction {config.reduction!r} looks at {' and '.join(sorted(projected))} patches, "
            "which training changes; train with another (divprune:features=hidden does not)"
        )
    return reduction


def visual_capacity(config: TrainConfig) -> int:
    """R: visual token slots per image."""
    return run_reduction(config).capacity_for(config.sizes.vision.num_patches)


def fewest_visual_tokens(config: TrainConfig) -> int:
    """Lower bound of the visual tokens per image; a reduction that depends on it may keep one."""
    return 1 if run_reduction(config).varying else visual_capacity(config)


class ImageEncoder:
    """The frozen tower and the token reduction as one jitted function of one shape.

    Args:
      config: configuration of the run, model sizes included.
      weights: all weights of the run, or their shapes; those of the tower are used.
      mesh: the devices; every image is kept on its data shard.
    """

    def __init__(self, config: TrainConfig, weights: Weights | Shapes, mesh: Mesh) -> None:
        prefix = "vision."
        vision = config.sizes.vision
        module = AbstractModule.of(lambda seed: VisionTower(vision, rngs=nnx.Rngs(seed)))
        self._weights = {path: weights[prefix + path] for path in module.variables}
        dtype = jnp.dtype(config.dtype)
        self._encode = jax.jit(
            functools.partial(
                _encode,
                module,
                reduction=run_reduction(config),
                dtype=dtype,
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
    module: AbstractModule[VisionTower],
    weights: Weights,
    pixels: jax.Array,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> VisualTokens:
    vision = module.merge(weights)
    return encode_images(vision, pixels, reduction, dtype=dtype)

"""A training objective on a mesh, stepped by hand, for the tests of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import common
from prumerge_jax.data.pipeline import Example
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.sharding.mesh import make_mesh, use_mesh
from prumerge_jax.training.batches import BatchPacker, RowBatch, RowShape
from prumerge_jax.training.config import TrainConfig, parse, with_sizes
from prumerge_jax.training.fit import shardings_of
from prumerge_jax.training.objectives.next_token import ImageEncoder
from prumerge_jax.training.objectives.registry import make_objective
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer
from prumerge_jax.training.step import TrainState, TrainStep, state_shardings
from tests.training.conftest import make_examples

MODEL = LlavaConfig(
    vision=VisionConfig(
        image_size=48, patch_size=8, width=16, mlp_width=32, num_layers=2, num_heads=2
    ),
    text=TextConfig(
        vocab_size=64, width=32, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, max_positions=256,
    ),
)  # fmt: skip
EXAMPLES = make_examples(8, image_size=48, vocabulary=64, text_only=(2, 5))


def lora_config(**changes: object) -> TrainConfig:
    """LoRA of `MODEL`; `Bench` replaces the sizes."""
    config = common.training()
    config.learning_rates = (("decoder.*.lora_?", 1e-2), ("projector.*", 1e-3))
    config.adapter = ml_collections.ConfigDict({"rank": 4, "alpha": 8.0, "dropout": 0.0})
    config.reduction = "prumerge:neighbours=4"
    config.batch_size = len(EXAMPLES)
    config.dtype = "float32"
    config.max_length = 48
    config.remat = "none"
    config.seed = 1
    config.update(changes)
    return with_sizes(parse(config), MODEL)


@dataclasses.dataclass
class Bench:
    """An objective with weights on a mesh, stepped by hand."""

    config: TrainConfig
    sizes: tuple[int, int, int] = (1, 1, 1)
    model: LlavaConfig = MODEL

    def __post_init__(self) -> None:
        self.mesh = make_mesh(*self.sizes)
        self.config = with_sizes(self.config, self.model)
        self.objective = make_objective(self.config)
        shardings = shardings_of(self.config, self.objective, self.mesh)
        rng = np.random.default_rng(0)
        weights = {}
        for path, shape in sorted(self.objective.shapes().items()):
            value = 0.2 * rng.normal(size=shape.shape) + path.endswith(".scale")
            value = value.astype(np.float32)
            if jnp.issubdtype(shape.dtype, jnp.integer):  # codes of a quantised kernel
                value = rng.integers(0, 8, shape.shape).astype(shape.dtype)
            weights[path] = jax.device_put(value, shardings[path])
        self.trained = {p: w for p, w in weights.items() if p in self.objective.learning_rates}
        self.frozen = {p: w for p, w in weights.items() if p not in self.objective.learning_rates}
        optimizer = make_optimizer(
            OptimizerConfig(warmup_ratio=0.0), 10, self.objective.learning_rates
        )
        self.shardings = state_shardings(optimizer, self.objective.trained(), shardings, self.mesh)
        self.step = TrainStep(self.objective.loss, optimizer, seed=1, shardings=self.shardings)

    def batches(self, rows: int, examples: list[Example] = EXAMPLES) -> list[RowBatch]:
        packer = BatchPacker(
            ImageEncoder(self.config, self.frozen, self.mesh),
            num_patches=self.model.vision.num_patches,
            shape=RowShape(rows, self.config.row_length),
            mesh=self.mesh,
        )
        (prepared,) = packer([examples], 0)
        return prepared.batches

    def train(self, rows: int, steps: int) -> tuple[TrainState, list[float]]:
        with use_mesh(self.mesh):
            batches = self.batches(rows)
            state, losses = self.step.init(self.trained), []
            for step in range(steps):
                state, metrics = self.step(state, self.frozen, batches, step)
                losses.append(float(metrics.loss))
        return state, losses

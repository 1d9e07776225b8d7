"""The published recipes against their table, and every configuration built without an array."""

import pkgutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import configs
import configs.digits
from configs import (
    llava_v1_5_7b_lora,
    llava_v1_5_7b_pretrain,
    llava_v1_5_13b_lora,
    prumerge_7b_lora,
    prumerge_13b_lora,
)
from configs.digits import align, contrastive, finetune, language, lora, miniature
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.models.config import published
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer
from prumerge_jax.training.stages import abstract_rows, make_stage, model_config

LORA = {"rank": 128, "alpha": 256.0, "dropout": 0.05}
# model, global batch, template, image mode, learning rates, adapters, grouped, reduction
TABLE = {
    llava_v1_5_7b_pretrain: (
        "llava-1.5-7b", 32 * 8, "plain", "crop", {"projector": 1e-3}, None, False, "full",
    ),
    llava_v1_5_7b_lora: (
        "llava-1.5-7b", 16 * 8, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True, "full",
    ),
    llava_v1_5_13b_lora: (
        "llava-1.5-13b", 16 * 8, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True, "full",
    ),
    prumerge_7b_lora: (
        "llava-1.5-7b", 20 * 4 * 2, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True,
        "prumerge",
    ),
    prumerge_13b_lora: (
        "llava-1.5-13b", 8 * 6 * 4, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True,
        "prumerge",
    ),
}  # fmt: skip
NEXT_TOKEN = [*TABLE, language, align, finetune, lora]


@pytest.mark.parametrize("recipe", TABLE, ids=lambda recipe: recipe.__name__)
def test_published_recipes_equal_their_table(recipe) -> None:
    model, batch, template, mode, rates, adapter, grouped, reduction = TABLE[recipe]
    config = recipe.get_config()
    assert model_config(config.model) == published(model)
    assert config.batch_size == batch
    assert (config.conversation, config.image_mode) == (template, mode)
    assert config.group_by_modality_length is grouped
    assert config.reduction == reduction
    assert (config.adapter and config.adapter.to_dict()) == adapter
    assert config.epochs == 1
    assert config.steps is None
    assert config.max_length == 2048
    assert config.seed == 42
    assert config.dtype == "bfloat16"
    assert config.remat == "full"
    assert config.run.num_workers == 4
    assert OptimizerConfig(**config.optimizer) == OptimizerConfig(
        warmup_ratio=0.03, weight_decay=0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=None
    )
    stage = make_stage(config, model_config(config.model))
    found = {"lora" if "lora" in p else p.split(".")[0]: r for p, r in stage.learning_rates.items()}
    assert found == rates
    layers = model_config(config.model).text.num_layers
    adapters = [path for path in stage.learning_rates if "lora" in path]
    assert len(adapters) == (14 if adapter else 0)
    for path in adapters:
        assert stage.shapes()[path].shape[0] == layers
        assert 128 in stage.shapes()[path].shape[1:]


@pytest.mark.parametrize("recipe", NEXT_TOKEN, ids=lambda recipe: recipe.__name__)
def test_a_step_of_every_recipe_traces_at_full_size(recipe) -> None:
    """Shapes and dtypes of loss, gradient and update, without allocating a weight."""
    config = recipe.get_config()
    model = model_config(config.model)
    stage = make_stage(config, model)
    shapes, trained = stage.shapes(), stage.trained()
    frozen = {path: shape for path, shape in shapes.items() if path not in trained}
    assert {shape.dtype for shape in trained.values()} == {jnp.dtype(jnp.float32)}
    assert {shape.dtype for shape in frozen.values()} == {jnp.dtype(config.dtype)}
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), 100, stage.learning_rates)

    def step(trained, frozen, batch, state):
        def loss(trained):
            return stage.loss({**frozen, **trained}, batch, jax.random.key(0))

        (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return value, count, updates, state

    state = jax.eval_shape(optimizer.init, trained)
    batch = abstract_rows(config, model, shards=2)
    value, count, updates, after = jax.eval_shape(step, trained, frozen, batch, state)
    assert value.shape == count.shape == ()
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(updates) == describe(trained)
    assert describe(after) == describe(state)


def test_the_contrastive_stage_trains_the_tower_and_what_reads_it() -> None:
    config = contrastive.get_config()
    stage = make_stage(config, model_config(config.model))
    assert set(stage.learning_rates) == set(stage.template.variables)
    assert "vision.last.q_proj.kernel" in stage.learning_rates


def test_the_miniature_is_small_and_its_vocabulary_fits() -> None:
    config = finetune.get_config()
    shapes = make_stage(config, miniature.MODEL).shapes()
    parameters = sum(int(np.prod(shape.shape)) for shape in shapes.values())
    assert 4 * parameters < 3_000_000  # bytes in float32
    assert digits_tokenizer.build_for_digits()
    with pytest.raises(ValueError, match="mode is 'huge'; expected none or 'tiny'"):
        finetune.get_config("huge")


def test_every_field_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=holder)
    arguments = [
        "train.py",
        f"--config={lora.__file__}:tiny",
        "--config.learning_rates=(('projector.*', 1e-5),)",
        "--config.adapter.rank=8",
        "--config.weights=/models/llava",
        "--config.optimizer.clip_norm=0.5",
        "--config.run.mesh.tensor=2",
        "--config.reduction=prumerge:neighbours=16",
        "--config.seed=3",
    ]
    monkeypatch.setattr(sys, "argv", arguments)  # where config_flags looks for the fields
    holder(arguments)
    values = config.value
    assert values.learning_rates == (("projector.*", 1e-5),)
    assert (values.adapter.rank, values.weights, values.seed) == (8, "/models/llava", 3)
    assert (values.optimizer.clip_norm, values.run.mesh.tensor) == (0.5, 2)
    assert (values.reduction, values.steps) == ("prumerge:neighbours=16", 4)


def test_every_configuration_is_covered_here() -> None:
    names = {m.name for m in pkgutil.iter_modules(configs.__path__)} - {"common", "digits"}
    covered = {recipe.__name__.removeprefix("configs.") for recipe in TABLE}
    training = {name for name in names if "lora" in name or "pretrain" in name}
    assert training == covered
    stages = {m.name for m in pkgutil.iter_modules(configs.digits.__path__)} - {"miniature"}
    assert stages >= {"contrastive", "language", "align", "finetune", "refine", "lora"}

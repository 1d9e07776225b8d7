"""The published recipes against their table, and every configuration built without an array."""

import dataclasses
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
    any_budget_7b_lora,
    common,
    llava_next_7b_lora,
    llava_onevision_0_5b_lora,
    llava_v1_5_7b_lora,
    llava_v1_5_7b_pretrain,
    llava_v1_5_13b_lora,
    prumerge_7b_lora,
    prumerge_7b_qlora,
    prumerge_13b_lora,
    video_llava_7b_lora,
)
from configs import lora as lora_of_any_model
from configs.digits import align, any_budget, contrastive, finetune, lora
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.families import published
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.training.batches import RowBatch
from prumerge_jax.training.config import ConfigError, TrainConfig, parse, with_sizes
from prumerge_jax.training.fit import CAUTIOUS, fixed
from prumerge_jax.training.objectives.next_token import abstract_rows
from prumerge_jax.training.objectives.registry import make_objective
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer
from prumerge_jax.training.pairs import PairBatch
from tests.training.bench import MODEL

LORA = AdapterConfig(rank=128, alpha=256.0, dropout=0.05)
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
    prumerge_7b_qlora: (
        "llava-1.5-7b", 20 * 4 * 2, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True,
        "prumerge",
    ),
    any_budget_7b_lora: (
        "llava-1.5-7b", 16 * 8, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True,
        "cover:tokens=288,alpha=1,block=8",
    ),
    prumerge_13b_lora: (
        "llava-1.5-13b", 8 * 6 * 4, "v1", "pad", {"lora": 2e-4, "projector": 2e-5}, LORA, True,
        "prumerge",
    ),
}  # fmt: skip
FAMILIES = {
    # Sizes, samples of a step, template, rank, tokens of a row, crops or frames of a sample.
    llava_next_7b_lora: ("llava-next-vicuna-7b", 128, "vicuna_v1", 128, 4096, 5),
    llava_onevision_0_5b_lora: ("llava-onevision-0.5b", 64, "qwen_1_5", 64, 8192, 32),
    video_llava_7b_lora: ("video-llava-7b", 128, "v1", 128, 2048, 8),
}
ON_CONVERSATIONS = [*TABLE, *FAMILIES, align, finetune, lora, any_budget]


@pytest.mark.parametrize("recipe", TABLE, ids=lambda recipe: recipe.__name__)
def test_published_recipes_equal_their_table(recipe) -> None:
    model, batch, template, mode, rates, adapter, grouped, reduction = TABLE[recipe]
    config = parse(recipe.get_config())
    assert config.model == published(model)
    assert config.batch_size == batch
    assert (config.conversation, config.image_mode) == (template, mode)
    assert config.group_by_modality_length is grouped
    assert config.reduction == reduction
    assert config.adapter == adapter
    assert config.epochs == 1
    assert config.steps is None
    assert config.max_length == 2048
    assert config.seed == 42
    assert config.dtype == "bfloat16"
    assert (config.remat, config.run.rows_per_shard) == ("auto", 0)
    assert config.run.num_workers == 4
    assert config.optimizer == OptimizerConfig(
        warmup_ratio=0.03, weight_decay=0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=None
    )
    objective = make_objective(config)
    found = {
        "lora" if "lora" in p else p.split(".")[0]: r for p, r in objective.learning_rates.items()
    }
    assert found == rates
    layers = config.sizes.text.num_layers
    adapters = [path for path in objective.learning_rates if "lora" in path]
    assert len(adapters) == (14 if adapter else 0)
    for path in adapters:
        assert objective.shapes()[path].shape[0] == layers
        assert 128 in objective.shapes()[path].shape[1:]


@pytest.mark.parametrize("recipe", FAMILIES, ids=lambda recipe: recipe.__name__)
def test_recipes_of_families_equal_their_table(recipe) -> None:
    model, batch, template, rank, length, crops = FAMILIES[recipe]
    config = parse(recipe.get_config())
    assert config.model == published(model)
    assert (config.batch_size, config.conversation, config.max_length) == (batch, template, length)
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.alpha) == (rank, 2 * rank)
    assert (config.reduction, config.crops_per_sample) == ("prumerge+", crops)
    rates = make_objective(config).learning_rates
    others = {path.split(".")[0] for path in rates if "lora" not in path}
    newline = {"image_newline"} if config.sizes.image_newline else set()
    assert others == {"projector"} | newline
    assert {rate for path, rate in rates.items() if "lora" in path} == {2e-4}
    assert {rate for path, rate in rates.items() if "lora" not in path} == {2e-5}


@pytest.mark.parametrize("recipe", ON_CONVERSATIONS, ids=lambda recipe: recipe.__name__)
def test_a_step_of_every_recipe_traces_at_full_size(recipe) -> None:
    """Shapes and dtypes of loss, gradient and update, without allocating a weight."""
    config = fixed(parse(recipe.get_config()), CAUTIOUS)
    objective = make_objective(config)
    trained, frozen = objective.trained(), objective.frozen()
    assert trained | frozen == objective.shapes()
    assert {shape.dtype for shape in trained.values()} == {jnp.dtype(jnp.float32)}
    codes = {path for path in frozen if path.endswith(("kernel_q", "kernel_scale"))}
    assert bool(codes) == (config.quantize is not None)
    assert {frozen[path].dtype for path in set(frozen) - codes} == {jnp.dtype(config.dtype)}
    optimizer = make_optimizer(config.optimizer, 100, objective.learning_rates)

    def step(trained, frozen, batch, state):
        def loss(trained):
            return objective.loss({**frozen, **trained}, batch, jax.random.key(0))

        (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return value, count, updates, state

    state = jax.eval_shape(optimizer.init, trained)
    batch = abstract_rows(config, shards=2, length=config.row_length)
    if config.objective == "any_budget":
        batch = pairs_of(batch, config)
    value, count, updates, after = jax.eval_shape(step, trained, frozen, batch, state)
    assert value.shape == count.shape == ()
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(updates) == describe(trained)
    assert describe(after) == describe(state)


def pairs_of(student: RowBatch, config: TrainConfig) -> PairBatch:
    """A micro-batch of any-budget training, without its values."""
    images, _, width = student.visual_tokens.shape
    tokens = (images, config.sizes.vision.num_patches, width)
    student = student._replace(
        visual_tokens=jax.ShapeDtypeStruct(tokens, student.visual_tokens.dtype)
    )
    rows = student.ids.shape[0]
    longer = jax.ShapeDtypeStruct((rows, config.objective_options["teacher_length"]), jnp.int32)
    teacher = RowBatch(*[longer] * 5, student.visual_tokens)
    return PairBatch(student, teacher, student.targets)


def test_the_contrastive_objective_trains_the_tower_and_what_reads_it() -> None:
    objective = make_objective(parse(contrastive.get_config()))
    assert set(objective.learning_rates) == set(objective.module.variables)
    assert "vision.last.q_proj.kernel" in objective.learning_rates


def test_the_miniature_is_small_and_its_vocabulary_fits() -> None:
    shapes = make_objective(parse(finetune.get_config())).shapes()
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
        "--config.data.name=llava_json",
        "--config.data.json_file=own.json",
        "--config.data.image_folder=images",
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
    data = parse(values).data
    assert (data.name, data.json_file, data.image_folder) == ("llava_json", "own.json", "images")


def test_every_configuration_is_covered_here() -> None:
    names = {m.name for m in pkgutil.iter_modules(configs.__path__)} - {"common", "digits"}
    covered = {recipe.__name__.removeprefix("configs.") for recipe in [*TABLE, *FAMILIES]}
    training = {name for name in names if "lora" in name or "pretrain" in name}
    assert training == covered | {"lora"}
    stages = {m.name for m in pkgutil.iter_modules(configs.digits.__path__)} - {"miniature"}
    assert stages == {"contrastive", "align", "finetune", "lora", "any_budget"}


@pytest.mark.parametrize("model", [MODEL, published("llava-1.5-7b")])
def test_lora_of_any_model_takes_its_sizes_from_the_weights(model: LlavaConfig) -> None:
    config = parse(lora_of_any_model.get_config())
    assert config.model is None
    config = with_sizes(config, model)
    assert config.row_length == min(2048, model.text.max_positions)
    objective = make_objective(config)
    parts = {path.split(".")[0] for path in objective.learning_rates}
    assert parts == {"decoder", "projector"}
    assert all("lora_" in path for path in objective.learning_rates if path.startswith("decoder"))


def test_a_pretrained_recipe_has_no_adapters_and_takes_them_by_flag() -> None:
    config = llava_v1_5_7b_pretrain.get_config()
    assert parse(config).adapter is None
    config.adapter.rank = 8
    assert parse(config).adapter == AdapterConfig(rank=8, alpha=256.0, dropout=0.05)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batchsize", 4, "unknown field config.batchsize; did you mean 'batch_size'?"),
        ("run.log_evry", 4, "unknown field config.run.log_evry; did you mean 'log_every'?"),
        ("data.json_fle", "x", "unknown field config.data.json_fle; did you mean 'json_file'?"),
        ("batch_size", "4", "config.batch_size is '4'; expected int"),
        ("batch_size", 0, "config.batch_size is 0; expected at least 1"),
        ("batch_size", True, "config.batch_size is True; expected int"),
        ("steps", -1, "config.steps is -1; expected at least 1"),
        ("epochs", 0.0, "config.epochs is 0.0; expected a positive number"),
        ("seed", -1, "config.seed is -1; expected at least 0"),
        (
            "quantize",
            "int8x8",
            "config.quantize is 'int8x8'; expected one of ['nf4', 'int8', 'int4'",
        ),
        ("dtype", "bf16", "config.dtype is 'bf16'; expected one of ['float32', 'bfloat16'"),
        ("remat", "ful", "did you mean 'full'?"),
        ("image_mode", "stretch", "config.image_mode is 'stretch'; expected one of"),
        ("tokenizer_style", "4.3", "config.tokenizer_style is '4.3'; expected one of"),
        ("position_ids", "x" * 9000, "config.position_ids is 'xxx"),
        ("conversation", "chatml_direct", "config.conversation is 'chatml_direct'; expected one"),
        ("learning_rates", (("*", "fast"),), "config.learning_rates is 'fast'; expected float"),
        ("learning_rates", (("*",),), "config.learning_rates is ['*']; expected"),
        ("learning_rates", (("*", -1.0),), "'*' has the rate -1.0; expected 0 or more"),
        ("optimizer.clip_norm", -1.0, "config.optimizer.clip_norm is -1.0; expected a positive"),
        ("adapter", 8, "config.adapter is 8; expected a section of fields"),
        ("adapter.dropout", 2.0, "config.adapter.adapter dropout is 2.0"),
        ("run.mesh.data", -2, "config.run.mesh.data is -2; expected 0 or more devices"),
        ("run.rows_per_shard", -1, "config.run.rows_per_shard is -1; expected at least 0"),
        ("model.text.num_kv_heads", 5, "config.model.text.num_heads 32 is not a multiple"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(field: str, value: object, message: str) -> None:
    config = prumerge_7b_lora.get_config()
    section, _, name = field.rpartition(".")
    target = config
    for part in section.split(".") if section else []:
        target = target[part]
    with target.unlocked(), target.ignore_type():
        target[name] = value
    with pytest.raises(ConfigError) as error:
        parse(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_an_objective_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    config = prumerge_7b_lora.get_config()
    config.objective = "next-token"
    with pytest.raises(ConfigError, match=r"'next-token'; expected one of .* 'next_token'\?"):
        make_objective(parse(config))


def test_the_configuration_is_frozen() -> None:
    config = parse(common.training())
    assert isinstance(config, TrainConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3

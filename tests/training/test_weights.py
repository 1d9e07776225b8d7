"""Flat weights, which of them train, where a run starts and what it exports."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from configs import common
from prumerge_jax.conversion.convert import REPORT
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.models import config_json
from prumerge_jax.models.config import TextConfig, VisionConfig, published
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.config import parse, with_sizes
from prumerge_jax.training.objectives.registry import Objective, make_objective
from prumerge_jax.training.weights import (
    AbstractModule,
    Pretrained,
    llava_module,
    load_pretrained,
    trained_paths,
)
from tests.training.bench import MODEL

MODULE = AbstractModule.of(
    lambda seed: LlavaModel(published("tiny"), adapter=AdapterConfig(rank=2), rngs=nnx.Rngs(seed))
)


def test_patterns_name_what_trains() -> None:
    rates = trained_paths(MODULE.variables, (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5)))
    adapters = {path for path in MODULE.variables if "lora_" in path}
    projector = {path for path in MODULE.variables if path.startswith("projector.")}
    assert len(adapters) == 14  # A and B of seven layers
    assert len(projector) == 4
    assert rates == dict.fromkeys(adapters, 2e-4) | dict.fromkeys(projector, 2e-5)


def test_patterns_that_fit_nothing_or_collide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern 'tower\.\*' fits no weight"):
        trained_paths(MODULE.variables, (("tower.*", 1e-3),))
    with pytest.raises(ValueError, match=r"fits both 'projector\.\*' and '\*\.bias'"):
        trained_paths(MODULE.variables, (("projector.*", 1e-3), ("*.bias", 1e-3)))


@pytest.mark.slow
def test_random_weights_are_those_of_the_module() -> None:
    mesh = make_mesh()
    shapes, shardings = MODULE.shapes(), MODULE.shardings(mesh)
    with nnx.use_eager_sharding(False):
        module = MODULE.make(3)
    path = "decoder.layers.mlp.up_proj.lora_a"
    (drawn,) = MODULE.random(3, {path: shapes[path]}, shardings).values()
    expected = module.decoder.layers.mlp.up_proj.lora_a[...]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    assert float(jnp.std(drawn)) > 0.01
    half = {path: jax.ShapeDtypeStruct(drawn.shape, jnp.bfloat16)}
    (rounded,) = MODULE.random(3, half, shardings).values()
    np.testing.assert_array_equal(rounded, drawn.astype(jnp.bfloat16))


def test_merge_puts_every_weight_in_its_place() -> None:
    weights = {
        path: np.full(shape.shape, index, shape.dtype)
        for index, (path, shape) in enumerate(sorted(MODULE.shapes().items()))
    }
    merged = nnx.to_flat_state(nnx.state(MODULE.merge(weights)))
    assert {".".join(path): variable[...].flat[0] for path, variable in merged} == {
        path: value.flat[0] for path, value in weights.items()
    }
    with pytest.raises(KeyError, match="projector.linear_0.bias"):
        MODULE.merge({p: w for p, w in weights.items() if p != "projector.linear_0.bias"})


ADAPTER = AdapterConfig(rank=2, alpha=4.0, dropout=0.0)


def load(config: ml_collections.ConfigDict) -> Pretrained:
    return load_pretrained(parse(config))


def objective_of(config: ml_collections.ConfigDict) -> Objective:
    return make_objective(with_sizes(parse(config), MODEL))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """A model without projector, in float32."""
    rng = np.random.default_rng(0)
    shapes = llava_module(MODEL, None).shapes()
    return {
        path: rng.normal(size=shape.shape).astype(np.float32)
        for path, shape in sorted(shapes.items())
        if not path.startswith("projector.")
    }


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    with directories.DirectoryWriter(directory, MODEL) as writer:
        for path, weight in weights.items():
            writer.write_array(path, weight)
        writer.write_file("tokenizer.model", b"pieces")
        writer.write_file("preprocessor.json", b"{}")
        writer.write_file(REPORT, b"{}")
    return directory


@pytest.fixture
def config(directory: pathlib.Path) -> ml_collections.ConfigDict:
    config = common.training()
    config.model = common.sizes(MODEL)
    config.weights = str(directory)
    config.learning_rates = (("decoder.*.lora_?", 1e-3), ("projector.*", 1e-3))
    config.adapter = ml_collections.ConfigDict({"rank": 2, "alpha": 4.0, "dropout": 0.0})
    config.max_length = 64
    return config


@pytest.mark.slow
def test_frozen_weights_are_rounded_for_the_run_and_exported_as_they_were(
    config: ml_collections.ConfigDict, weights: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    pretrained, mesh, objective = load(config), make_mesh(2, 2, 2), objective_of(config)
    shardings = objective.module.shardings(mesh)
    loaded = pretrained.load(
        objective.module, objective.shapes(), objective.learning_rates, shardings
    )
    for path, weight in loaded.items():
        assert weight.sharding == shardings[path], path
        if path in weights:
            expected = jnp.asarray(weights[path], jnp.bfloat16)
            np.testing.assert_array_equal(weight, expected, err_msg=path)
        else:
            assert weight.dtype == jnp.float32, path
    # New weights: the projector is random, A of an adapter too, B is zero.
    assert float(jnp.std(loaded["projector.linear_0.kernel"])) > 0.01
    assert float(jnp.std(loaded["decoder.layers.mlp.up_proj.lora_a"])) > 0.01
    assert not loaded["decoder.layers.mlp.up_proj.lora_b"].any()

    trained = {path: loaded[path] for path in objective.learning_rates}
    pretrained.export(tmp_path / "out", trained, ADAPTER, mesh, {"from": "a test"})
    directories.verify(tmp_path / "out")
    assert config_json.read_adapter(tmp_path / "out") == ADAPTER
    stored = directories.read_manifest(tmp_path / "out").arrays
    assert set(stored) == set(loaded)
    for path, entry in stored.items():
        assert entry.dtype == jnp.float32
        got = directories.load_array(
            tmp_path / "out", path, jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        )
        expected = weights.get(path, loaded[path])
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), path
    for name in ("tokenizer.model", "preprocessor.json"):
        assert (tmp_path / "out" / name).exists()
    assert not (tmp_path / "out" / REPORT).exists()

    # Adapters continue only as adapters of the same kind.
    config.weights = str(tmp_path / "out")
    assert load(config).identity() != pretrained.identity()
    config.adapter.rank = 0
    with pytest.raises(directories.DirectoryError, match="merge them into the weights first"):
        load(config)


def test_a_missing_frozen_weight_is_refused(config: ml_collections.ConfigDict) -> None:
    config.learning_rates = (("decoder.*.lora_?", 1e-3),)
    objective = objective_of(config)
    with pytest.raises(directories.DirectoryError, match="lacks the weights .'projector.linear_0"):
        load(config).load(
            objective.module, objective.shapes(), objective.learning_rates, make_mesh()
        )


def test_sizes_that_a_recipe_fixes_must_agree_but_the_vocabulary_may_differ(
    config: ml_collections.ConfigDict,
) -> None:
    config.model.text.vocab_size = 99
    config.model.pad_token_id = 5
    assert load(config).model == MODEL
    config.model.vision.width = 32
    with pytest.raises(directories.DirectoryError, match="holds a model with .*config.model says"):
        load(config)
    config.model = {}
    assert load(config).model == MODEL


@pytest.mark.slow
def test_the_same_weights_written_twice_count_as_the_same(
    config: ml_collections.ConfigDict, weights: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    identities = [load(config).identity()]
    for name, change in (("again", 0.0), ("other", 1e-3)):
        with directories.DirectoryWriter(tmp_path / name, MODEL) as writer:
            for path, weight in weights.items():
                writer.write_array(path, weight + np.float32(change))
        config.weights = str(tmp_path / name)
        identities.append(load(config).identity())
    assert identities[0] == identities[1] != identities[2]


def test_a_directory_is_hashed_by_verify_alone(
    config: ml_collections.ConfigDict, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    file = copy / "preprocessor.json"
    file.write_bytes(b"[]")  # as long as before
    config.weights = str(copy)
    pretrained = load(config)
    pretrained.verify(hashes=False)
    with pytest.raises(directories.DirectoryError, match="was altered"):
        pretrained.verify(hashes=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": None}, "config.weights is not set; expected a model directory"),
        ({"weights": "/no/such"}, "/no/such: no such directory; config.weights names the model"),
        ({"weights": "random"}, "config.tokenizer must name a tokenizer.model"),
        ({"weights": "random", "model": {}}, "config.model names no sizes"),
    ],
)
def test_weights_are_asked_for_by_name(
    config: ml_collections.ConfigDict, fields: dict[str, object], message: str
) -> None:
    for name, value in fields.items():
        config[name] = value
    with pytest.raises(ValueError, match=message):
        load(config)


def test_random_weights_take_the_tokenizer_that_the_configuration_names(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    config.weights, config.tokenizer = "random", str(tmp_path / "tokenizer.model")
    with pytest.raises(directories.DirectoryError, match="no such file, or not a regular file"):
        load(config).tokenizer("4.31")
    config.tokenizer = "digits"
    with pytest.raises(directories.DirectoryError, match="'digits' has 3.. pieces, .* 64 rows"):
        load(config).tokenizer("4.31")
    config.model.text.vocab_size = 400
    assert load(config).tokenizer("4.31").sha256() == tokenizer.sha256()


def test_random_weights_are_identified_by_sizes_and_seed() -> None:
    def identity(seed: int, vision: VisionConfig = MODEL.vision) -> str:
        text = TextConfig(width=8)
        return Pretrained(type(MODEL)(vision=vision, text=text), None, {}, seed).identity()

    assert identity(0) == identity(0)
    assert len({identity(0), identity(1), identity(0, VisionConfig())}) == 3

"""What a run starts from and leaves behind, when it computes in bfloat16."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from prumerge_jax.conversion.convert import REPORT
from prumerge_jax.models import config_json
from prumerge_jax.models.config import TextConfig, VisionConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.base import Base, open_base
from prumerge_jax.training.stages import llava_template, make_stage
from tests.training.test_step import MODEL

ADAPTER = AdapterConfig(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """A model without projector, in float32."""
    rng = np.random.default_rng(0)
    shapes = llava_template(MODEL, None).shapes()
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


def test_frozen_weights_are_rounded_for_the_run_and_exported_as_they_were(
    config: ml_collections.ConfigDict, weights: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    base, mesh, stage = open_base(config), make_mesh(2, 2, 2), make_stage(config, MODEL)
    loaded = base.weights(stage, stage.shapes(), mesh)
    shardings = stage.template.shardings(mesh)
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

    trained = {path: loaded[path] for path in stage.learning_rates}
    base.export(tmp_path / "out", trained, ADAPTER, mesh, {"from": "a test"})
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

    # Adapters go on only as adapters of the same kind.
    config.weights = str(tmp_path / "out")
    assert open_base(config).hash() != base.hash()
    config.adapter = None
    with pytest.raises(directories.DirectoryError, match="merge them into the weights first"):
        open_base(config)


def test_a_missing_frozen_weight_is_refused(config: ml_collections.ConfigDict) -> None:
    config.learning_rates = (("decoder.*.lora_?", 1e-3),)
    stage = make_stage(config, MODEL)
    with pytest.raises(directories.DirectoryError, match="lacks the weights .'projector.linear_0"):
        open_base(config).weights(stage, stage.shapes(), make_mesh())


def test_sizes_that_a_recipe_fixes_must_agree_but_the_vocabulary_may_differ(
    config: ml_collections.ConfigDict,
) -> None:
    config.model.text.vocab_size = 99
    config.model.pad_token_id = 5
    assert open_base(config).model == MODEL
    config.model.vision.width = 32
    with pytest.raises(directories.DirectoryError, match="holds a model with .*config.model says"):
        open_base(config)


def test_random_weights_are_identified_by_sizes_and_seed() -> None:
    def identity(seed: int, vision: VisionConfig = MODEL.vision) -> str:
        text = TextConfig(width=8)
        return Base(type(MODEL)(vision=vision, text=text), None, {}, seed).hash()

    assert identity(0) == identity(0)
    assert len({identity(0), identity(1), identity(0, VisionConfig())}) == 3

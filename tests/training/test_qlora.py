"""QLoRA: adapters on quantised kernels that nothing changes, exported onto the unquantised base."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs.digits import contrastive, lora
from prumerge_jax.conversion.export import export_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.models import config_json
from prumerge_jax.models.quantisation import FORMATS, quantise
from prumerge_jax.models.quantised_weights import stored_format
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.config import parse
from prumerge_jax.training.objectives.registry import make_objective
from prumerge_jax.training.run import check, run
from prumerge_jax.training.weights import trained_paths
from prumerge_jax.training.workdir import StopFlag
from tests.training.bench import Bench, lora_config


@pytest.mark.slow
def test_frozen_codes_are_quantised_and_never_change() -> None:
    bench = Bench(lora_config(quantize="nf4"))
    shapes = bench.objective.shapes()
    stem = "decoder.layers.mlp.up_proj."
    assert f"{stem}kernel" not in shapes
    assert shapes[f"{stem}kernel_q"].dtype == jnp.uint4
    assert shapes[f"{stem}kernel_scale"].dtype == jnp.float32
    assert all(shapes[path].dtype == jnp.float32 for path in shapes if path.startswith("vision."))
    before = {path: np.asarray(w).tobytes() for path, w in bench.frozen.items()}
    state, losses = bench.train(2, 3)
    assert losses[-1] < losses[0]
    for path, content in before.items():
        assert np.asarray(bench.frozen[path]).tobytes() == content, path
    assert {path for path in state.trained if "kernel" in path} == {
        "projector.linear_0.kernel",
        "projector.linear_2.kernel",
    }


def test_quantised_kernels_do_not_train() -> None:
    paths = make_objective(lora_config(quantize="nf4")).module.variables
    with pytest.raises(ValueError, match="quantised kernels do not train, adapters on them do"):
        trained_paths(paths, (("decoder.*", 1e-3),))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    """The tiny stage of adapters, on the model that a first stage exports."""
    folder = tmp_path_factory.mktemp("qlora")
    first = contrastive.get_config("tiny")
    first.data.directory = str(folder / "data")
    first.data.train_scenes = 32
    first.batch_size = 16
    first.steps = 1
    first.objective_options.curriculum = ((1, 1.0, 1),)
    run(first, folder / "first", StopFlag())
    config = lora.get_config("tiny")
    config.data.directory = str(folder / "data")
    config.weights = str(folder / "first" / "model")
    config.data.train_scenes = 32
    config.max_length = 256
    config.batch_size = 8
    config.run.rows_per_shard = 4
    config.quantize = "nf4"
    return config


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_merges_onto_the_unquantised_base(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    base = pathlib.Path(config.weights)
    config.steps = 4
    run(config, tmp_path / "straight", StopFlag())
    stop = StopFlag()
    stop.request("a test")
    run(config, tmp_path / "resumed", stop)  # saves and ends
    assert not (tmp_path / "resumed" / "model").exists()
    run(config, tmp_path / "resumed", StopFlag())
    model = tmp_path / "straight" / "model"
    stored = directories.read_manifest(model).arrays
    assert {p: a.sha256 for p, a in stored.items()} == {
        p: a.sha256
        for p, a in directories.read_manifest(tmp_path / "resumed" / "model").arrays.items()
    }
    # The base is written as it was, so that adapters merge onto it.
    assert stored_format(model) is None
    kernel = "decoder.layers.mlp.up_proj.kernel"
    assert stored[kernel] == directories.read_manifest(base).arrays[kernel]
    assert config_json.read_adapter(model) is not None
    export_model(model, tmp_path / "merged", Dialect.LLAVA, merge=True)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_base_is_quantised_as_it_is_read(config: ml_collections.ConfigDict) -> None:
    setup = check(parse(config), {})
    objective = setup.objective
    mesh = make_mesh(1, 1, 2)
    shardings = objective.module.shardings(mesh)
    weights = setup.pretrained.load(
        objective.module, objective.shapes(), objective.learning_rates, shardings
    )
    stem = "decoder.layers.mlp.gate_proj."
    kernel = directories.read_array(config.weights, f"{stem}kernel")
    for part, expected in zip(
        ("kernel_q", "kernel_scale"), quantise(jnp.asarray(kernel), FORMATS["nf4"]), strict=True
    ):
        np.testing.assert_array_equal(weights[stem + part], expected)
        assert weights[stem + part].sharding == shardings[stem + part]
    assert jax.tree.all(jax.tree.map(lambda w: w.dtype != jnp.float64, weights))

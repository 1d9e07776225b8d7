"""Checkpoints in: every bit arrives, nothing else does, and refusals leave nothing behind."""

import collections
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.detect import Kind, detect
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import SafetensorsFile
from prumerge_jax.conversion.tensor_files import CheckpointError
from prumerge_jax.models import config_json
from prumerge_jax.store import model_directory as directory
from tests.conversion.checkpoints import (
    TINY,
    edit_config,
    named,
    split,
    write_hf,
    write_tensors,
)
from tests.programs import run_program

ROOT = pathlib.Path(__file__).resolve().parents[2]


def targets(folder: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    stored = directory.read_manifest(folder).arrays
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in stored.items()}


def canonical_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What a converted directory holds, taken apart again."""
    arrays = directory.load_arrays(folder, targets(folder))
    tensors = {
        key: tensor
        for weight in keys.weights(config_json.read_config(folder))
        for key, tensor in split(weight, np.asarray(arrays[weight.path])).items()
    }
    unused = SafetensorsFile(folder / "passthrough.safetensors")
    return tensors | {key: unused.read(key) for key in unused.tensors}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (array.shape, array.dtype), key
        assert ours[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize(
    ("dtype", "max_shard_bytes"), [("bfloat16", 5_000), ("float16", 1 << 40), ("float32", 90_000)]
)
def test_every_bit_arrives(tmp_path: pathlib.Path, dtype: str, max_shard_bytes: int) -> None:
    tensors = write_hf(tmp_path / "in", dtype=dtype, max_shard_bytes=max_shard_bytes)
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"\0tokens")
    counted = collections.Counter[str]()
    report = convert(
        open_model(Sources(tmp_path / "in")),
        tmp_path / "out",
        progress=lambda nbytes: counted.update(done=nbytes),
    )
    directory.verify(tmp_path / "out")
    assert config_json.read_config(tmp_path / "out") == TINY
    assert config_json.read_adapter(tmp_path / "out") is None
    assert_same_bits(canonical_tensors(tmp_path / "out"), tensors)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\0tokens"
    assert counted["done"] == sum(array.nbytes for array in tensors.values())
    written = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["tensors_in"] + written["tensors_kept_aside_unused"] == len(tensors)
    assert len(written["input_sha256"]) == len(list((tmp_path / "in").glob("*.safetensors")))
    assert written["dtype_changes"] == {}


def test_a_dtype_is_rounded_to_and_reported(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in", dtype="float32")
    report = convert(
        open_model(Sources(tmp_path / "in")), tmp_path / "out", dtype=np.dtype(jnp.bfloat16)
    )
    unused = keys.passthrough(TINY.vision)
    rounded = {
        key: array if key in unused else np.asarray(jnp.asarray(array).astype(jnp.bfloat16))
        for key, array in tensors.items()
    }
    assert_same_bits(canonical_tensors(tmp_path / "out"), rounded)
    assert report.dtype_changes == {"float32 -> bfloat16": len(tensors) - len(unused)}


def test_all_namings_of_transformers(tmp_path: pathlib.Path) -> None:
    from tests.conversion.test_keys import namings

    tensors = write_hf(tmp_path / "A")
    for naming in "ABCD":
        folder = tmp_path / f"naming {naming}"
        write_tensors(folder, {namings(key)[naming]: a for key, a in tensors.items()})
        (folder / "config.json").write_bytes((tmp_path / "A" / "config.json").read_bytes())
        opened = open_model(Sources(folder))
        assert_same_bits({key: t.read() for key, t in opened.tensors.items()}, tensors)


@pytest.mark.torch
def test_transformers_own_files_match_an_independent_table(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    from flax import nnx

    from tests.models.torch_llava import our_state, random_torch_llava

    model = random_torch_llava(TINY)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    opened = open_model(Sources(tmp_path / "in"))
    convert(opened, tmp_path / "out")
    arrays = directory.load_arrays(tmp_path / "out", targets(tmp_path / "out"))
    expected = nnx.to_flat_state(our_state(model, opened.config)[1])
    assert len(expected) == len(arrays)
    for path, variable in expected:
        ours = arrays[".".join(map(str, path))]
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(variable[...]))


def refusal(tmp_path: pathlib.Path, **options: object) -> str:
    """The message with which a conversion is refused; asserts that it left nothing."""
    with pytest.raises(CheckpointError) as caught:
        convert(open_model(Sources(tmp_path / "in")), tmp_path / "out", **options)  # type: ignore
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_values_are_refused(tmp_path: pathlib.Path, bad: float) -> None:
    tensors = write_hf(tmp_path / "in")
    tensors["language_model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    write_tensors_again(tmp_path / "in", tensors)
    assert "layers.1.mlp.up_proj.weight: holds NaN or infinity" in refusal(tmp_path)


def test_overflow_of_a_dtype_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in", dtype="float32")
    tensors["lm_head.weight"][0, 0] = 1e6
    write_tensors_again(tmp_path / "in", tensors)
    assert "overflow float16" in refusal(tmp_path, dtype=np.dtype("float16"))


def test_mixed_layers_need_a_dtype(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    key = "language_model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].astype(np.float32)
    write_tensors_again(tmp_path / "in", tensors)
    assert "decoder.layers.mlp.up_proj.kernel: its layers are stored as" in refusal(tmp_path)
    convert(open_model(Sources(tmp_path / "in")), tmp_path / "out", dtype=np.dtype(jnp.bfloat16))


def test_quantised_weights_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    write_tensors_again(tmp_path / "in", tensors)
    assert "dtype int8" in refusal(tmp_path)


def write_tensors_again(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / "model.safetensors").unlink()
    write_tensors(folder, named(tensors, Dialect.HF))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlavaNextForConditionalGeneration"]}, "LLaVA-NeXT"),
        ({"architectures": ["LlavaOnevisionForConditionalGeneration"]}, "OneVision"),
        ({"architectures": ["VideoLlavaForConditionalGeneration"]}, "Video-LLaVA"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ({"mm_video_tower": "x"}, "Video-LLaVA"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "neither LLaVA-1.5"),
        ({"architectures": 3}, "neither LLaVA-1.5"),
    ],
)
def test_other_families_are_refused_by_name(
    tmp_path: pathlib.Path, config: dict[str, object], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        detect(tmp_path)


def test_a_directorys_name_does_not_matter(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "mpt-lora-mistral"
    write_hf(folder)
    assert detect(folder).kind is Kind.HF
    edit_config(folder, architectures=...)
    assert "text_config and vision_config" in detect(folder).reason
    convert(open_model(Sources(folder)), tmp_path / "llava-1.5-7b-hf")
    assert detect(tmp_path / "llava-1.5-7b-hf").kind is Kind.OURS
    with pytest.raises(CheckpointError, match="holds none of"):
        detect(tmp_path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program("convert_weights.py", *arguments)


def test_the_program(tmp_path: pathlib.Path) -> None:
    write_hf(tmp_path / "in", dtype="float32")
    output = tmp_path / "deep" / "out"
    done = run(f"--input={tmp_path / 'in'}", f"--output={output}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "config.json names LlavaForConditionalGeneration" in done.stdout
    assert {str(a.dtype) for a in directory.read_manifest(output).arrays.values()} == {"bfloat16"}
    again = run(f"--input={tmp_path / 'in'}", f"--output={output}")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == (
        f"error: {output} exists; remove it or name another directory"
    )


def test_the_program_there_and_back(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert run(f"--input={tmp_path / 'in'}", f"--output={ours}").returncode == 0
    done = run("--to=hf", f"--input={ours}", f"--output={back}")
    assert done.returncode == 0, done.stderr
    read = SafetensorsFile(tmp_path / "back" / "model.safetensors")
    assert_same_bits({key: read.read(key) for key in read.tensors}, named(tensors))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=hf", "--input=in"], "error: --to=hf needs one of our directories as --input"),
        (["--input=nowhere"], "error: nowhere is not a directory"),
        (
            ["--download=a/b", "--revision=main"],
            "error: --download needs --revision=COMMIT, 40 hexadecimal digits, not 'main'",
        ),
    ],
)
def test_the_program_refuses_in_one_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    write_hf(tmp_path / "in")
    command = [sys.executable, str(ROOT / "convert_weights.py"), *arguments, "--output=out"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message
    assert not (tmp_path / "out").exists()


def test_downloads_stay_offline_where_told_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from prumerge_jax.conversion.download import download

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"cannot download a/b@{'0' * 40}"):
        download("a/b", "0" * 40)


def test_flags_that_mean_nothing_are_refused(tmp_path: pathlib.Path) -> None:
    done = run("--to=hf", f"--input={tmp_path}", "--output=x", "--dtype=float16", "--allow_pickle")
    assert done.returncode != 0
    assert "--to=hf takes no --dtype --allow_pickle" in done.stderr + done.stdout

"""Checkpoints in: every bit arrives, nothing else does, and refusals leave no files."""

import collections
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.conversion import download as download_module
from prumerge_jax.conversion import keys, verify
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.detect import Kind, detect
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import SafetensorsFile
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.conversion.tokenizer_file import missing_tokenizer_warning
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
from tests.tiny_llava import tokenizer_model

ROOT = pathlib.Path(__file__).resolve().parents[2]


# Large enough a vocabulary for a tokenizer with all bytes.
WORDS = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=448))


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
    unused = SafetensorsFile(folder / "unused_tower_tensors.safetensors")
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
    tensors = write_hf(tmp_path / "in", WORDS, dtype=dtype, max_shard_bytes=max_shard_bytes)
    tokenizer = tokenizer_model()
    (tmp_path / "in" / "tokenizer.model").write_bytes(tokenizer)
    counted = collections.Counter[str]()
    report = convert(
        open_model(Sources(tmp_path / "in")),
        tmp_path / "out",
        progress=lambda nbytes: counted.update(done=nbytes),
    )
    directory.verify(tmp_path / "out")
    assert config_json.read_config(tmp_path / "out") == WORDS
    assert config_json.read_adapter(tmp_path / "out") is None
    assert_same_bits(canonical_tensors(tmp_path / "out"), tensors)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer
    assert counted["done"] == sum(array.nbytes for array in tensors.values())
    written = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["tensors_in"] + written["unused_tower_tensors"] == len(tensors)
    assert len(written["input_sha256"]) == len(list((tmp_path / "in").glob("*.safetensors")))
    assert written["dtype_changes"] == {}


def test_a_dtype_is_rounded_to_and_reported(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in", dtype="float32")
    report = convert(
        open_model(Sources(tmp_path / "in")), tmp_path / "out", dtype=np.dtype(jnp.bfloat16)
    )
    unused = keys.unused_tower_tensors(TINY)
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
    with pytest.raises(ConversionError) as caught:
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
        ({"architectures": ["LlavaNextVideoForConditionalGeneration"]}, "LLaVA-NeXT-Video, which"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "LLaVA on MPT"),
        ({"mm_video_tower": "x"}, "Video-LLaVA"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "none of LLaVA-1.5, LLaVA-NeXT"),
        ({"architectures": 3}, "none of LLaVA-1.5, LLaVA-NeXT"),
    ],
)
def test_other_families_are_refused_by_name(
    tmp_path: pathlib.Path, config: dict[str, object], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        detect(tmp_path)


def test_a_directorys_name_does_not_matter(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "mpt-lora-mistral"
    write_hf(folder)
    assert detect(folder).kind is Kind.HF
    edit_config(folder, architectures=...)
    assert "text_config and vision_config" in detect(folder).reason
    convert(open_model(Sources(folder)), tmp_path / "llava-1.5-7b-hf")
    assert detect(tmp_path / "llava-1.5-7b-hf").kind is Kind.OURS
    with pytest.raises(ConversionError, match="holds none of"):
        detect(tmp_path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program("convert_weights.py", *arguments)


def test_the_program(tmp_path: pathlib.Path) -> None:
    write_hf(tmp_path / "in", dtype="float32")
    output = tmp_path / "deep" / "out"
    done = run(f"--input={tmp_path / 'in'}", f"--output={output}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == missing_tokenizer_warning(output)
    assert "config.json names LlavaForConditionalGeneration" in done.stdout
    assert {str(a.dtype) for a in directory.read_manifest(output).arrays.values()} == {"bfloat16"}
    again = run(f"--input={tmp_path / 'in'}", f"--output={output}")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == (
        f"convert_weights.py: {output} exists; remove it or name another directory"
    )


def test_the_program_there_and_back(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert run(f"--input={tmp_path / 'in'}", f"--output={ours}").returncode == 0
    done = run("--to=hf", f"--input={ours}", f"--output={back}")
    assert done.returncode == 0, done.stderr
    read = SafetensorsFile(tmp_path / "back" / "model.safetensors")
    assert_same_bits({key: read.read(key) for key in read.tensors}, named(tensors))


def refusal_of_the_program(*arguments: str) -> str:
    """What `convert_weights.py` says on these arguments, which it must refuse."""
    done = run_program("convert_weights.py", *arguments)
    assert done.returncode == 1
    lines = done.stderr.replace("\r", "\n").splitlines()
    (message,) = [line for line in lines if line and "%|" not in line]  # but for progress bars
    return message


def test_the_output_is_looked_at_before_anything_is_downloaded_or_verified(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expensive(*arguments: object) -> pathlib.Path:
        raise AssertionError("this is expensive")

    monkeypatch.setattr(download_module, "download", expensive)
    monkeypatch.setattr(directory, "verify", expensive)
    (tmp_path / "out").symlink_to("nowhere")
    for arguments in (["--download=a/b"], ["--input=ours", "--to=hf"]):
        error = refusal_of_the_program(*arguments, f"--output={tmp_path / 'out'}")
        assert "out exists; remove it or name another directory" in error


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "in")
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    arguments = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'new' / 'out'}")
    error = refusal_of_the_program(*arguments)
    expected = r"out needs [4-7](\.\d+)?e-05 GB, the disk has 1e-05 GB left; make room"
    assert re.search(expected, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "in")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for writer in ("write_array", "write_file", "_write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(directory.DirectoryWriter, writer, full)
            error = refusal_of_the_program(
                f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'new' / 'out'}"
            )
        assert "No space left on device" in error
        assert "\n" not in error
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_verify_needs_is_checked_before_converting(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "in")
    monkeypatch.setattr(verify, "_import_torch", lambda: (None, None))
    monkeypatch.setattr(verify, "available_memory", lambda: 1000)
    error = refusal_of_the_program(
        f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--verify"
    )
    assert "--verify needs 0.0 GB of memory for one float32 model" in error
    assert not (tmp_path / "out").exists()


def test_memory_in_the_page_cache_is_available(tmp_path: pathlib.Path) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:       16000 kB\nMemFree:        3600 kB\nMemAvailable:   13600 kB\n"
    )
    assert verify.available_memory(tmp_path / "meminfo") == 13600 * 1024
    assert verify.available_memory(tmp_path / "none") > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\1\2random" * 99, "is not a SentencePiece model"),
        (b"", "is not a SentencePiece model"),
        (None, " pieces, the model's embedding 128 rows"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(
    tmp_path: pathlib.Path, content: bytes | None, message: str
) -> None:
    write_hf(tmp_path / "in")
    content = tokenizer_model() if content is None else content
    (tmp_path / "in" / "tokenizer.model").write_bytes(content)
    assert message in refusal(tmp_path)


def hub_cache(root: pathlib.Path) -> pathlib.Path:
    """A checkpoint in the layout of `~/.cache/huggingface/hub`; returns the snapshot."""
    write_hf(root / "plain")
    model = root / "hub" / "models--o--m"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted((root / "plain").iterdir())):
        file.rename(model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_read_and_the_cache_explained(
    tmp_path: pathlib.Path,
) -> None:
    snapshot = hub_cache(tmp_path)
    convert(open_model(Sources(snapshot)), tmp_path / "out")
    model = snapshot.parents[1]
    for folder, named_directory in [
        (model, "snapshots/abc"),
        (model / "snapshots", "abc"),
        (model.parent, "models--o--m/snapshots/abc"),
    ]:
        with pytest.raises(ConversionError, match=f"snapshots/COMMIT director.*{named_directory}"):
            detect(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_links_that_lead_out_are_refused(tmp_path: pathlib.Path, name: str) -> None:
    write_hf(tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "in" / "original").mkdir()
    inside = (tmp_path / "in" / name).rename(tmp_path / "in" / "original" / name)
    (tmp_path / "in" / name).symlink_to(f"original/{name}")
    open_model(Sources(tmp_path / "in"))  # a link within the directory
    (tmp_path / "in" / name).unlink()
    inside.rename(tmp_path / "secret")
    (tmp_path / "in" / name).symlink_to("../secret")
    with pytest.raises(ConversionError, match=f"{name} is a link that leads out of its directory"):
        open_model(Sources(tmp_path / "in"))
    # Nor do a snapshot's links lead anywhere but into its blobs.
    snapshot = hub_cache(tmp_path / "cache")
    (snapshot / "x.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConversionError, match="x.json is a link that leads out"):
        open_model(Sources(snapshot))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=hf", "--input=in"], "--to=hf needs one of our directories as --input"),
        (["--input=nowhere"], "nowhere is not a directory"),
        (
            ["--download=a/b", "--revision=main"],
            "--download needs --revision=COMMIT, 40 hexadecimal digits, not 'main'",
        ),
        ([], "give one of --input and --download"),
        (["--input=in", "--download=a/b"], "give one of --input and --download"),
        (["--input=in", "more"], "unexpected argument 'more'"),
        (["--input=in", "--revision=main"], "--revision is the commit of --download"),
        (["--input=in", "--merge"], "--merge is about an adapter"),
        (["--input=in", "--adapter_base=a/b"], "--adapter_base is about an adapter"),
        (["--to=peft", "--input=in", "--merge"], "--to=peft takes no --merge"),
        (["--to=hf", "--input=in", "--adapter_base=a"], "--to=hf takes no --adapter_base"),
        (["--to=hf", "--download=a/b", "--revision=x"], "takes no --download --revision"),
        (
            ["--to=llava", "--input=in", "--dtype=float16", "--allow_pickle"],
            "--to=llava takes no --dtype --allow_pickle",
        ),
        *(
            ([f"--to={to}", "--input=in", flag], f"--to={to} takes no {flag.split('=')[0]}")
            for to in ("hf", "llava", "peft")
            for flag in ("--vision_tower=in", "--projector=in", "--adapter=in", "--verify")
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
    monkeypatch.chdir(tmp_path)
    error = refusal_of_the_program(*arguments, "--output=out")
    assert error.startswith(f"convert_weights.py: {message}") or message in error
    assert "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_downloads_stay_offline_where_told_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    from prumerge_jax.conversion.download import download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConversionError, match=f"cannot download a/b@{'0' * 40}"):
        download("a/b", "0" * 40)

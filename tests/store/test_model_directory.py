"""The model directory: what is written comes back, and nothing damaged or unfinished does."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig, RopeScaling, published
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.store import array_files, strict_json
from prumerge_jax.store import manifest as manifests
from prumerge_jax.store import model_directory as directory
from prumerge_jax.store.errors import DirectoryError
from prumerge_jax.store.model_directory import DirectoryWriter, weights_identity

TINY = published("tiny")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "decoder.layers.mlp.up_proj.kernel": rng.normal(size=(3, 8, 16)).astype(jnp.bfloat16),
        "decoder.norm.scale": rng.normal(size=8).astype(np.float32),
        "vision.class_embedding": rng.normal(size=4).astype(np.float16),
    }


def targets(stored: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in stored.items()}


@pytest.fixture
def written(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "model"
    with DirectoryWriter(folder, TINY, adapter=AdapterConfig(rank=4), source={"of": "x"}) as writer:
        for path, array in arrays().items():
            writer.write_array(path, array)
        writer.write_file("tokenizer.json", b"{}")
    return folder


def test_everything_comes_back_bit_for_bit(written: pathlib.Path) -> None:
    directory.verify(written)
    assert config_json.read_config(written) == TINY
    assert config_json.read_adapter(written) == AdapterConfig(rank=4)
    assert directory.read_manifest(written).source == {"of": "x"}
    loaded = directory.load_arrays(written, targets(arrays()))
    for path, array in arrays().items():
        assert loaded[path].dtype == array.dtype
        assert np.asarray(loaded[path]).tobytes() == array.tobytes()
    assert sorted(p.name for p in written.parent.iterdir()) == ["model"]


def test_weights_arrive_in_their_shards(written: pathlib.Path) -> None:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    wanted = targets(arrays())
    path = "decoder.layers.mlp.up_proj.kernel"
    sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    wanted[path] = jax.ShapeDtypeStruct((3, 8, 16), jnp.bfloat16, sharding=sharding)
    loaded = directory.load_arrays(written, wanted)[path]
    assert loaded.sharding == sharding
    assert {shard.data.shape for shard in loaded.addressable_shards} == {(3, 4, 4)}
    assert np.asarray(loaded).tobytes() == arrays()[path].tobytes()


def test_a_weight_is_read_into_host_memory(written: pathlib.Path) -> None:
    for path, array in arrays().items():
        read = directory.read_array(written, path)
        assert type(read) is np.ndarray
        assert (read.dtype, read.tobytes()) == (array.dtype, array.tobytes())
    with pytest.raises(DirectoryError, match="lacks the weight b"):
        directory.read_array(written, "b")


def test_a_weight_of_many_chunks_is_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "_CHUNK_BYTES", 64)
    array = np.arange(5 * 7 * 9, dtype=np.float32).reshape(5, 7, 9)
    with DirectoryWriter(tmp_path / "m", TINY) as writer:
        # What conversion hands over is often a transposed view.
        writer.write_array("a", np.asarray(array.transpose(0, 2, 1)))
    loaded = directory.load_arrays(tmp_path / "m", targets({"a": array.transpose(0, 2, 1)}))["a"]
    np.testing.assert_array_equal(loaded, array.transpose(0, 2, 1))
    assert sum(p.stat().st_size > 0 for p in (tmp_path / "m/params/a/state").rglob("*.*.*")) > 20


def test_another_dtype_is_cast_once_with_rounding(written: pathlib.Path) -> None:
    wanted = targets(arrays())
    wanted["decoder.norm.scale"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    loaded = directory.load_arrays(written, wanted)["decoder.norm.scale"]
    expected = arrays()["decoder.norm.scale"].astype(jnp.bfloat16)
    assert np.asarray(loaded).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.norm.scale"), r"does not have.*decoder\.norm\.scale"),
        (lambda t: t.update(b=jax.ShapeDtypeStruct((1,), "float32")), r"lacks.*'b'"),
        (
            lambda t: t.update({"decoder.norm.scale": jax.ShapeDtypeStruct((9,), "float32")}),
            r"decoder\.norm\.scale: stored \(8,\), expected \(9,\)",
        ),
    ],
)
def test_other_weights_than_asked_for_are_errors(
    written: pathlib.Path, change: object, message: str
) -> None:
    wanted = targets(arrays())
    change(wanted)  # type: ignore[operator]
    with pytest.raises(DirectoryError, match=message):
        directory.load_arrays(written, wanted)


def test_every_damaged_file_is_named(written: pathlib.Path) -> None:
    listed = directory.read_manifest(written).files
    files = [written / name for name, (size, _) in listed.items() if size]
    assert len(files) > 10
    for file in files:
        intact = file.read_bytes()
        flipped = bytearray(intact)
        flipped[len(intact) // 2] ^= 1
        for damaged in (bytes(flipped), intact[:-1], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name):
                directory.verify(written)
            file.write_bytes(intact)
    directory.verify(written)


def test_sizes_are_verified_without_hashes(written: pathlib.Path) -> None:
    file = written / "tokenizer.json"
    file.write_bytes(b"[]")
    directory.verify(written, hashes=False)
    file.write_bytes(b"{ }")
    with pytest.raises(DirectoryError, match=r"tokenizer.json has 3 bytes"):
        directory.verify(written, hashes=False)


def test_strangers_among_the_weights_and_links_are_refused(written: pathlib.Path) -> None:
    (written / "params" / "extra").write_bytes(b"x")
    with pytest.raises(DirectoryError, match="extra is not in the manifest"):
        directory.verify(written)
    (written / "params" / "extra").unlink()
    (written / "tokenizer.json").rename(written / "elsewhere")
    (written / "tokenizer.json").symlink_to("elsewhere")
    with pytest.raises(DirectoryError, match="not a plain file"):
        directory.verify(written)


def rewrite_manifest(folder: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alters the manifest and renews its checksum, as a deliberate edit would."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["sha256"]
    change(values)
    (folder / "manifest.json").write_bytes(manifests.seal(json.dumps(values).encode()))


FILE_ENTRY = {"size": 1, "sha256": ""}


def to_version_1(folder: pathlib.Path) -> None:
    """The manifest as the first versions of this package wrote it."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["sha256"]
    values["format_version"] = 1
    for entry in values["arrays"].values():
        del entry["sha256"]
    (folder / "manifest.json").write_text(json.dumps(values, indent=1) + "\n")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_manifest_entries_stay_inside(written: pathlib.Path, name: str) -> None:
    rewrite_manifest(written, lambda manifest: manifest["files"].update({name: FILE_ENTRY}))
    with pytest.raises(DirectoryError, match="leads out"):
        directory.verify(written)


def test_directories_of_version_1_load_and_have_the_same_identity(written: pathlib.Path) -> None:
    identity = weights_identity(written)
    to_version_1(written)
    directory.verify(written)
    loaded = directory.load_arrays(written, targets(arrays()))
    for path, array in arrays().items():
        assert np.asarray(loaded[path]).tobytes() == array.tobytes()
    assert weights_identity(written) == identity


def test_digests_are_of_the_content_in_c_order(written: pathlib.Path) -> None:
    stored = directory.read_manifest(written).arrays
    for path, array in arrays().items():
        assert stored[path].sha256 == hashlib.sha256(array.tobytes()).hexdigest()


def write(folder: pathlib.Path, weights: Mapping[str, np.ndarray | jax.Array]) -> pathlib.Path:
    with DirectoryWriter(folder, TINY) as writer:
        for path, array in weights.items():
            writer.write_array(path, array)
    return folder


def test_the_same_weights_have_one_identity_however_they_were_written(
    tmp_path: pathlib.Path, written: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = weights_identity(written)
    backwards = dict(reversed(arrays().items()))
    assert weights_identity(write(tmp_path / "again", backwards)) == identity
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    path = "decoder.layers.mlp.up_proj.kernel"
    sharded = jax.device_put(arrays()[path], NamedSharding(mesh, P(None, "fsdp", "tensor")))
    assert weights_identity(write(tmp_path / "s", arrays() | {path: sharded})) == identity
    monkeypatch.setattr(array_files, "_CHUNK_BYTES", 64)
    assert weights_identity(write(tmp_path / "cut", arrays() | {path: sharded})) == identity
    assert weights_identity(write(tmp_path / "cut2", arrays())) == identity


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update({"decoder.norm.scale": -w["decoder.norm.scale"]}),
        lambda w: w.update({"decoder.norm.scale": w["decoder.norm.scale"].reshape(2, 4)}),
        lambda w: w.update({"decoder.norm.scale": w["decoder.norm.scale"].view(np.int32)}),
        lambda w: w.update({"decoder.norm.bias": w.pop("decoder.norm.scale")}),
        lambda w: w.pop("decoder.norm.scale"),
    ],
)
def test_other_weights_have_another_identity(
    tmp_path: pathlib.Path, written: pathlib.Path, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    weights = arrays()
    change(weights)
    assert weights_identity(write(tmp_path / "other", weights)) != weights_identity(written)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(
    written: pathlib.Path, data: st.DataObject
) -> None:
    listed = directory.read_manifest(written).files
    names = sorted(name for name, (size, _) in listed.items() if size) + ["manifest.json"] * 9
    file = written / data.draw(st.sampled_from(names))
    intact = file.read_bytes()
    place = data.draw(st.integers(0, len(intact) - 1))
    flipped = bytearray(intact)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        for damaged in (bytes(flipped), intact[:place]):
            file.write_bytes(damaged)
            with pytest.raises(DirectoryError, match=re.escape(file.name)):
                directory.verify(written)
    finally:
        file.write_bytes(intact)


def test_altered_config_is_refused(written: pathlib.Path) -> None:
    config = written / "config.json"
    config.write_bytes(config.read_bytes().replace(b'"width": 32', b'"width": 64'))
    with pytest.raises(DirectoryError, match="another hash"):
        config_json.read_config(written)


def test_an_error_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def fail_halfway() -> None:
        with DirectoryWriter(tmp_path / "m", TINY) as writer:
            writer.write_array("a", np.ones(3, np.float32))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    """The limit on a file's size replaces a full disk; TensorStore reports both alike."""

    def write_too_much() -> None:
        with DirectoryWriter(tmp_path / "new" / "m", TINY) as writer:
            writer.write_array("a", np.ones((500, 500), np.float32))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DirectoryError, match="params/a cannot be written: ") as caught:
            write_too_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_loads_and_can_be_repeated(
    tmp_path: pathlib.Path,
) -> None:
    program = (
        "import os, signal, sys, numpy as np\n"
        "from prumerge_jax.models.config import published\n"
        "from prumerge_jax.store.model_directory import DirectoryWriter\n"
        "with DirectoryWriter(sys.argv[1], published('tiny')) as writer:\n"
        "    writer.write_array('a', np.ones(3, np.float32))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "m"
    done = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["m.incomplete"]
    for folder in (target, tmp_path / "m.incomplete"):
        with pytest.raises(DirectoryError, match="not a finished model directory"):
            config_json.read_config(folder)
    with DirectoryWriter(target, TINY) as writer:
        writer.write_array("b", np.ones(3, np.float32))
    directory.verify(target)
    assert set(directory.read_manifest(target).arrays) == {"b"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_one_writer_at_a_time_and_never_over_an_old_one(tmp_path: pathlib.Path) -> None:
    with DirectoryWriter(tmp_path / "m", TINY) as first:
        first.write_array("a", np.ones(3, np.float32))
        with pytest.raises(DirectoryError, match="another process"):
            DirectoryWriter(tmp_path / "m", TINY).__enter__()
    with pytest.raises(DirectoryError, match="exists"):
        DirectoryWriter(tmp_path / "m", TINY).__enter__()


@pytest.mark.parametrize("path", ["", "..", "a/b", "a..b", ".a", "A b"])
def test_malformed_names_are_refused(tmp_path: pathlib.Path, path: str) -> None:
    with DirectoryWriter(tmp_path / "m", TINY) as writer:
        with pytest.raises(DirectoryError):
            writer.write_array(path, np.ones(1, np.float32))
        for name in ("..", "a/b", "/a", "manifest.json", "params", "config.json"):
            with pytest.raises(DirectoryError):
                writer.write_file(name, b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"width": 10**30}}, "width"),
        ({"vision": {"width": "32"}}, "expected int"),
        ({"vision": {"num_layers": True}}, "expected int"),
        ({"text": {"rms_norm_eps": -1}}, "outside"),
        ({"text": {"auto_map": "x"}}, "unknown fields"),
        ({"text": {"num_kv_heads": 3}}, "not a multiple"),
        ({"vision": {"pixel_std": [1, 2]}}, "list of 3"),
        ({"projector": ["mlp2x_gelu"]}, "string"),
        ({"text": None}, "expected an object"),
    ],
)
def test_configs_are_parsed_by_whitelist(change: dict[str, object], message: str) -> None:
    values = strict_json.to_json(TINY)
    for key, part in change.items():
        if isinstance(part, dict):
            values[key].update(part)
        else:
            values[key] = part
    with pytest.raises(ValueError, match=message):
        config_json.from_json(LlavaConfig, json.loads(json.dumps(values)), "config.json")


def test_directories_from_before_other_decoders_are_read(tmp_path: pathlib.Path) -> None:
    """One stop id, and none of the decoder's later options."""
    values = strict_json.to_json(TINY)
    for name in ("qkv_bias", "tied_head", "rope_scaling", "model_type"):
        del values["text"][name]
    values["eos_token_id"] = values.pop("eos_token_ids")[0]
    old = dataclasses.make_dataclass("Old", values)(**values)
    with DirectoryWriter(tmp_path / "m", old) as writer:
        writer.write_array("a", np.zeros(1, np.float32))
    assert config_json.read_config(tmp_path / "m") == TINY


def test_decoder_options_round_trip() -> None:
    text = dataclasses.replace(
        TINY.text, qkv_bias=True, tied_head=True, rope_scaling=RopeScaling("llama3", 8.0)
    )
    config = dataclasses.replace(TINY, text=text, bos_token_id=None, eos_token_ids=(5, 7))
    values = json.loads(json.dumps(strict_json.to_json(config)))
    assert config_json.from_json(LlavaConfig, values, "x") == config
    values["text"]["rope_scaling"]["kind"] = "yarn"
    with pytest.raises(ValueError, match=r"x\.text\.rope_scaling: .*'yarn'; expected 'linear'"):
        config_json.from_json(LlavaConfig, values, "x")


@settings(max_examples=50)
@given(st.integers(1, 512), st.floats(1, 1e6), st.sampled_from([None, 0, 31999]), st.integers(1, 8))
def test_configs_round_trip(width: int, theta: float, image: int | None, layers: int) -> None:
    text = dataclasses.replace(TINY.text, width=width, rope_theta=theta, num_layers=layers)
    config = dataclasses.replace(TINY, text=text, image_token_id=image)
    values = json.loads(json.dumps(strict_json.to_json(config)))
    assert config_json.from_json(LlavaConfig, values, "x") == config


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "{", "\xff", '{"a": ' + "9" * 9999]
)
def test_json_is_read_strictly(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="config.json"):
        strict_json.load_json(file)


def test_oversized_json_is_not_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 1 << 40)  # sparse
    with pytest.raises(ValueError, match="larger than"):
        strict_json.load_json(file)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_four_bits_are_packed_on_disk_alone(tmp_path: pathlib.Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 16, (2, 3, 8)) - (8 if dtype == "int4" else 0)
    array = values.astype(jnp.dtype(dtype))
    with DirectoryWriter(tmp_path / "model", TINY) as writer:
        writer.write_array("codes", array)
        writer.write_array("of_jax", jnp.asarray(array))
    directory.verify(tmp_path / "model")
    stored = directory.read_manifest(tmp_path / "model").arrays
    assert stored["codes"].shape == (2, 3, 8)
    assert stored["codes"].sha256 == stored["of_jax"].sha256
    packed = np.concatenate([values & 15], -1)
    expected = (packed[..., ::2] | packed[..., 1::2] << 4).astype(np.uint8)
    assert stored["codes"].sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    np.testing.assert_array_equal(directory.read_array(tmp_path / "model", "codes"), array)
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    target = jax.ShapeDtypeStruct(
        (2, 3, 8), jnp.dtype(dtype), sharding=NamedSharding(mesh, P("a", None, "b"))
    )
    loaded = directory.load_array(tmp_path / "model", "codes", target)
    np.testing.assert_array_equal(np.asarray(loaded), array)
    with pytest.raises(DirectoryError, match="stored as u?int4, expected float32"):
        directory.load_arrays(
            tmp_path / "model",
            dict.fromkeys(stored, jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)),
        )

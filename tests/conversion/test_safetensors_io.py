"""The reader agrees with the safetensors package and refuses what is malformed."""

import json
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.conversion.safetensors_io import (
    SafetensorsFile,
    ShardedWriter,
    encode,
    open_safetensors,
)
from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo, is_finite
from tests.conversion.checkpoints import write_tensors

DTYPES = ["float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "float64"]
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(TENSORS, st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read_by_both(
    tmp_path_factory: pytest.TempPathFactory,
    described: dict[str, tuple[str, list[int]]],
    shard_bytes: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.integers(0, 2, shape).astype(jnp.dtype(dtype))
        for name, (dtype, shape) in described.items()
        if name != "__metadata__"
    }
    folder = tmp_path_factory.mktemp("t")
    write_tensors(folder, tensors, shard_bytes)
    checkpoint = open_safetensors(folder)
    assert checkpoint is not None
    assert checkpoint.tensors == {k: TensorInfo(a.shape, a.dtype) for k, a in tensors.items()}
    theirs: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        theirs |= safetensors.numpy.load_file(file)
    for name, array in tensors.items():
        for read in (checkpoint.read(name), theirs[name]):
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_a_file_of_theirs_is_read(tmp_path: pathlib.Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.float32([[1]])}
    safetensors.numpy.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x")
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.read(name), array)
    (tmp_path / "y").write_bytes(encode(tensors))
    assert safetensors.numpy.load_file(tmp_path / "y").keys() == tensors.keys()


def entry(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}  # type: ignore


def raw(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty": (b"", "not a safetensors file"),
    "absurd header": (raw({}, length=1 << 40), "declares a header"),
    "header over the limit": (raw({}, length=200_000_000), "declares a header"),
    "negative header": (raw({}, length=(1 << 64) - 1), "declares a header"),
    "truncated header": (raw({"a": entry()})[:20], "declares a header"),
    "not json": (raw(b"{'a': 1}"), "not valid JSON"),
    "not an object": (raw([1, 2]), "not an object"),
    "many tensors": (raw({str(n): entry() for n in range(20_001)}), "20001 tensors in one"),
    "deep nesting": (raw(b"[" * 50_000), "nested too deeply"),
    "repeated name": (raw(b'{"a": 1, "a": 2}'), "repeated keys"),
    "truncated data": (raw({"a": entry()}, bytes(7)), "truncated"),
    "trailing bytes": (raw({"a": entry()}, bytes(9)), "truncated or altered"),
    "no tensors but data": (raw({}, bytes(8)), "truncated or altered"),
    "overlap": (raw({"a": entry(), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "same bytes twice": (raw({"a": entry(), "b": entry()}), "overlaps"),
    "gap": (raw({"a": entry(8, 16)}, bytes(16)), "follows a gap"),
    "wrong length": (raw({"a": entry(shape=[3])}), "do not hold 12 bytes"),
    "reversed": (raw({"a": entry(8, 0)}), "data_offsets"),
    "negative offset": (raw({"a": entry(-8, 0)}), "malformed data_offsets"),
    "negative shape": (raw({"a": entry(shape=[-1, -2])}), "malformed shape"),
    "overflowing shape": (raw({"a": entry(shape=[1 << 33, 1 << 33])}), "do not hold"),
    "float shape": (raw({"a": entry(shape=[2.0])}), "malformed shape"),
    "bool shape": (raw({"a": entry(shape=[True, 2])}), "malformed shape"),
    "rank 100": (raw({"a": entry(shape=[1] * 100 + [2])}), "malformed shape"),
    "unknown dtype": (raw({"a": entry(dtype="F4")}), "unsupported dtype"),
    "dtype not a string": (raw({"a": entry(dtype=["F32"])}), "unsupported dtype"),
    "extra field": (raw({"a": entry() | {"x": 1}}), "malformed header entry"),
    "entry not an object": (raw({"a": 3}), "malformed header entry"),
    "infinite": (raw(b'{"a": Infinity}'), "not valid JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_files_are_refused_in_one_line(tmp_path: pathlib.Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def indexed(folder: pathlib.Path) -> dict:
    """Two shards of one tensor each; returns the index, to be altered."""
    write_tensors(folder, {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}, 16)
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(a="../secret.safetensors"), "plain file name"),
        (lambda m: m.update(a="/etc/passwd"), "plain file name"),
        (lambda m: m.update(a="..\\secret.safetensors"), "plain file name"),
        (lambda m: m.update(a=7), "plain file name"),
        (lambda m: m.update(a="model.bin"), "does not end in"),
        (lambda m: m.update(a="model-00003-of-00003.safetensors"), "missing shards"),
        (lambda m: m.update(c=m["a"]), "not in the shard it names: c"),
        (lambda m: m.update(a=m["b"], b=m["a"]), "not in the shard it names: a, b"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_hostile_indexes_are_refused(tmp_path: pathlib.Path, change: object, message: str) -> None:
    index = indexed(tmp_path)
    change(index["weight_map"])  # type: ignore[operator]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=message):
        open_safetensors(tmp_path)


def test_shards_must_not_hold_more_than_the_index_says(tmp_path: pathlib.Path) -> None:
    index = indexed(tmp_path)
    shard = tmp_path / index["weight_map"]["b"]
    for tensors, message in [
        ({"b": np.ones(1), "extra": np.ones(1)}, "not in the index: extra"),
        ({"b": np.ones(1), "a": np.ones(1)}, "also stored in model-00001-of-00002"),
    ]:
        shard.write_bytes(encode(tensors))
        with pytest.raises(ConversionError, match=message):
            open_safetensors(tmp_path)


def test_the_writer_holds_its_caller_to_the_declaration(tmp_path: pathlib.Path) -> None:
    info = TensorInfo((2,), np.dtype(np.float32))
    writer = ShardedWriter(tmp_path, {"a": info, "b": info})
    with pytest.raises(ConversionError, match=r"declared float32 \(2,\)"):
        writer.write("a", np.zeros(2, np.float16))
    writer.write("b", np.zeros(2, np.float32))
    with pytest.raises(ConversionError, match="written before"):
        writer.write("b", np.zeros(2, np.float32))
    with pytest.raises(ConversionError, match="never written: a"):
        writer.finish()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_found(dtype: str, bad: float) -> None:
    array = np.linspace(-3e4, 3e4, 64).astype(jnp.dtype(dtype))
    assert is_finite(array)
    array[17] = bad
    assert not is_finite(array)

""".bin files are read without unpickling: what torch saves arrives, what could run is refused."""

import collections
import gc
import io
import os
import pathlib
import pickle
import struct
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.conversion.torch_bin import TorchFile, encode
from prumerge_jax.conversion.torch_pickle import write_pickle

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((2, 2), jnp.bfloat16),
    "c": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


def written(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    (folder / "x.bin").write_bytes(content)
    return folder / "x.bin"


def test_our_own_files_come_back(tmp_path: pathlib.Path) -> None:
    file = TorchFile(written(tmp_path, encode(TENSORS)))
    assert set(file.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


@pytest.mark.torch
def test_torch_reads_our_files(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    loaded = torch.load(written(tmp_path, encode(TENSORS)), weights_only=True)
    assert list(loaded) == list(TENSORS)
    for name, array in TENSORS.items():
        assert tuple(loaded[name].shape) == array.shape
        assert str(loaded[name].dtype) == f"torch.{array.dtype}"
        np.testing.assert_array_equal(
            loaded[name].to(torch.float32).numpy(), array.astype(np.float32)
        )


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves_is_read(tmp_path: pathlib.Path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(5, 6, 7)
    state = collections.OrderedDict(
        whole=base,
        slice=base[1:4, ::2, 3],
        transposed=base.permute(2, 0, 1),
        shared=base.view(-1),
        half=base.half(),
        brain=base.bfloat16().t() if base.dim() == 2 else base.bfloat16(),
        double=base.double(),
        numbers=torch.arange(5),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        parameter=torch.nn.Parameter(torch.randn(3, 2)),
        none=torch.zeros(0, 3),
    )
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
    file = TorchFile(tmp_path / "x.bin")
    assert set(file.tensors) == set(state)
    for name, tensor in state.items():
        expected = tensor.detach().contiguous()
        raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        read = file.read(name)
        assert str(read.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert read.shape == tuple(tensor.shape)
        assert read.tobytes() == raw, name
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "y.bin")  # has _metadata
    assert set(TorchFile(tmp_path / "y.bin").tensors) == {"weight", "bias"}


def archive(pickled: bytes, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"x/data/{name.removeprefix('_')}", content)
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def call(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n(X\x0c\0\0\0touch canarytR.".encode()


def tensor(
    shape: tuple[int, ...] = (2,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    numel: int = 2,
    storage: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """A pickle of {'a': tensor}, every number to be chosen."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + raw

    return b"".join(
        [
            b"\x80\x02}", text("a"), b"ctorch._utils\n_rebuild_tensor_v2\n((",
            text("storage"), f"ctorch\n{storage}\n".encode(), text(key), text("cpu"),
            number(numel), b"tQ", number(offset),
            b"(", *map(number, shape), b"t(", *map(number, strides), b"t",
            b"\x89ccollections\nOrderedDict\n)RtRs.",
        ]
    )  # fmt: skip


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doublings(count: int) -> bytes:
    """Tuples of which each holds the one before twice: 2^count in all."""
    steps = (bytes([*b"h", k - 1, *b"h", k - 1, *b"\x86q", k]) for k in range(1, count + 1))
    return b")q\x00" + b"".join(steps)


DOUBLINGS = b"\x80\x04" + doublings(40) + b"h\x28" + text("x") + b"\x93)R."
DEEP = b")" + b"\x85" * 50_000  # tuples in tuples
EIGHT = bytes(8)
HOSTILE = {
    "a tower of tuples as a module": (archive(DOUBLINGS), "names a class by a tuple"),
    "a tower of tuples as a key": (archive(doublings(40) + b"}h\x28K\x01s."), "a tuple, no str"),
    "a tower of tuples called": (archive(doublings(40) + b")R."), "calls a tuple"),
    "deep module": (archive(b"\x80\x04" + DEEP + text("x") + b"\x93)R."), "class by a tuple"),
    "deep key": (archive(b"}" + DEEP + b"K\x01s."), "a key that is a tuple, no string"),
    "deep persistent id": (archive(DEEP + b"Q."), "refers to a tuple"),
    "deep function": (archive(DEEP + b")R."), "calls a tuple, which"),
    "deep arguments": (
        archive(b"ctorch._utils\n_rebuild_tensor_v2\n" + DEEP + b"R."),
        "calls 'torch._utils._rebuild_tensor_v2'",
    ),
    "deep dictionaries": (
        archive((b"}" + text("a")) * 9999 + b"N" + b"s" * 9999 + b"."),
        "not a tensor",
    ),
    "a list of itself": (archive(b"]q\0" + b"h\0a" * 28_000 + b"Q."), "refers to a list"),
    "no string as a module": (archive(b"\x80\x04K\x01" + text("n") + b"\x93)R."), "by a int"),
    "a class as a module": (archive(b"\x80\x04ca\nb\n" + text("n") + b"\x93)R."), "by 'a.b'"),
    "long module": (archive(b"c" + b"m" * 900_000 + b"\nn\n)R."), "names a class by 'mmm"),
    "long key": (archive(b"}" + text("k" * 900_000) + b"K\x01s."), "holds 'kkk"),
    "long integer": (archive(b"L" + b"9" * 900_000 + b"L\n."), "malformed"),
    "long storage size": (archive(tensor(numel=1 << 100)), "no sound size"),
    "many instructions": (archive(b"}" * 500_000 + b"."), "more than 60000 instructions"),
    "large pickle": (archive(b"}" * 2_000_000 + b"."), "too many for tensors"),
    "many entries": (
        archive(b"}.", **{f"_{n}": b"" for n in range(25_000)}),
        "its zip directory has",
    ),
    "empty file": (b"", "not a file of torch.save"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a file of torch.save"),
    "bare pickle": (pickle.dumps({"a": 1}), "before 1.6"),
    "truncated zip": (encode(TENSORS)[:-40], "corrupt or truncated"),
    "first half of a zip": (encode(TENSORS)[:200], "corrupt or truncated"),
    "zip without pickle": (archive(b"").replace(b"data.pkl", b"data.txt"), "without data.pkl"),
    "reduce os.system": (archive(pickle.dumps(Evil(), 2)), "calls '.*system'"),
    "reduce protocol 5": (archive(pickle.dumps({"a": Evil()}, 5)), "calls '.*system'"),
    "builtins.eval": (archive(call("builtins", "eval")), "calls 'builtins.eval'"),
    "getattr chain": (archive(call("builtins", "getattr")), "calls 'builtins.getattr'"),
    "torch.load": (archive(call("torch", "load")), "calls 'torch.load'"),
    "numpy object": (archive(call("numpy", "load")), "calls 'numpy.load'"),
    "old instance opcode": (archive(b"(cos\nsystem\nX\x01\0\0\0aios\nsystem\n."), "uses INST"),
    "obj opcode": (archive(b"(cos\nsystem\no."), "uses OBJ"),
    "newobj": (archive(b"cos\nsystem\n)\x81."), "uses NEWOBJ"),
    "extension registry": (archive(b"\x82\x01."), "uses EXT1"),
    "text persistent id": (archive(b"Pevil\n."), "uses PERSID"),
    "persistent id not a storage": (archive(b"X\x01\0\0\0aQ."), "not a storage"),
    "huge memo": (archive(b"}r\xff\xff\xff\xff0."), "uses POP"),
    "declared huge string": (archive(b"}X\xff\xff\xff\x7fa."), "malformed"),
    "declared huge bytes": (archive(b"}\x8e" + b"\xff" * 7 + b"\x7f."), "malformed"),
    "stack underflow": (archive(b"s."), "malformed"),
    "no stop": (archive(b"}"), "malformed"),
    "list": (archive(b"]."), "no dictionary"),
    "value no tensor": (archive(b"}X\x01\0\0\0aK\x01s."), "not a tensor"),
    "nested dict": (archive(b"}X\x01\0\0\0a}s."), "not a tensor"),
    "key repeated": (archive(b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x01u."), "twice"),
    "key not a string": (archive(b"}K\x01K\x01s."), "no string"),
    "billion laughs": (archive(b")" + b"q\x00h\x00\x86" * 90 + b"Q."), "a tuple, which is not"),
    "storage missing": (archive(tensor()), "is missing"),
    "storage key leaves": (archive(tensor(key="../../etc/passwd"), _0=EIGHT), "is missing"),
    "storage too short": (archive(tensor(), _0=bytes(4)), "storage has 4 bytes"),
    "storage too long": (archive(tensor(), _0=bytes(12)), "storage has 12 bytes"),
    "shape leaves storage": (archive(tensor((3,)), _0=EIGHT), "leaves its storage"),
    "offset leaves storage": (archive(tensor(offset=1), _0=EIGHT), "leaves its storage"),
    "stride leaves storage": (archive(tensor(strides=(5,)), _0=EIGHT), "leaves its storage"),
    "expanded": (archive(tensor((1 << 50,), (0,)), _0=EIGHT), "leaves its storage"),
    "negative stride": (archive(tensor(strides=(-1,)), _0=EIGHT), "not sizes"),
    "negative offset": (archive(tensor(offset=-1), _0=EIGHT), "not sizes"),
    "rank mismatch": (archive(tensor((2,), (1, 1)), _0=EIGHT), "rank 1 with 2"),
    "quantised": (archive(tensor(storage="QInt8Storage"), _0=EIGHT), "QInt8Storage"),
    "negative numel": (archive(tensor(numel=-2), _0=EIGHT), "storage of type"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    content, message = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, content)
    gc.freeze()  # what other tests left behind must not be searched while this one is timed
    started = time.thread_time()
    with pytest.raises(ConversionError, match=message) as caught:
        TorchFile(file)
    seconds = time.thread_time() - started
    gc.unfreeze()
    assert seconds < 1
    assert "x.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]  # no canary


def test_the_control_is_accepted(tmp_path: pathlib.Path) -> None:
    """The hostile tensors above differ from this one only in what makes them hostile."""
    content = np.float32([1.5, 2.5]).tobytes()
    file = TorchFile(written(tmp_path, archive(tensor(), _0=content)))
    np.testing.assert_array_equal(file.read("a"), [1.5, 2.5])


def test_zip_tricks_are_refused(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", write_pickle({"a": np.zeros(2, np.float32)}))
        file.writestr("x/data/0", bytes(1 << 20))
    with pytest.raises(ConversionError, match="is compressed"):
        TorchFile(tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
        file.writestr("x/data.pkl", b"}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x/data.pkl", b"}.")
    with pytest.raises(ConversionError, match="repeated entry"):
        TorchFile(tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
        file.writestr("x/../../outside", b"")
    with pytest.raises(ConversionError, match="unexpected or repeated"):
        TorchFile(tmp_path / "x.bin")

"""Checkpoints that others have quantised: every kind by its own rule, hostile ones refused.

What bitsandbytes and compressed-tensors wrote on a CPU is in `packed_goldens.npz`, with what they
make of it again (`tests/conversion/make_packed_goldens.py`). GPTQ and AWQ are packed here, by the
published rules.
"""

import json
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.packed import PackedCheckpoint, unpacked
from prumerge_jax.conversion.safetensors_io import SafetensorsFile, encode
from prumerge_jax.conversion.tensor_files import Checkpoint, ConversionError
from prumerge_jax.models.quantisation import FORMATS, Quantised, dequantise
from prumerge_jax.store import model_directory as directory
from tests.conversion.checkpoints import edit_config, named, write_hf, write_tensors

GOLDENS = pathlib.Path(__file__).with_name("packed_goldens.npz")
RNG = np.random.default_rng(0)
OUT, IN = 16, 128
Tensors = dict[str, np.ndarray]


def state(**changes: object) -> np.ndarray:
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 128]} | changes
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def golden(case: str) -> tuple[Tensors, np.ndarray]:
    """The tensors of a layer `x`, and its weight as the library dequantises it."""
    with np.load(GOLDENS) as file:
        found = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{case}/")}
    return {name: a for name, a in found.items() if name != "expected"}, found["expected"]


def pack_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[..., n] -> int32 [..., n * bits / 32], lowest first."""
    per_word = 32 // bits
    grouped = numbers.reshape(*numbers.shape[:-1], -1, per_word).astype(np.uint32)
    words = np.bitwise_or.reduce(grouped << (bits * np.arange(per_word, dtype=np.uint32)), -1)
    return words.view(np.int32)


def grouped_weight(bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zeros and scales [G, out], and the weight [out, in]."""
    top = 1 << bits
    codes, groups = RNG.integers(0, top, (IN, OUT)), IN // group
    zeros = RNG.integers(1, top, (groups, OUT))
    scales = RNG.uniform(0.01, 0.1, (groups, OUT)).astype(np.float16)
    rows = np.arange(IN) // group
    weight = (codes - zeros[rows]).astype(np.float32) * scales[rows].astype(np.float32)
    return codes, zeros, scales, weight.T


def gptq(bits: int, group: int, version: str) -> tuple[Tensors, dict, np.ndarray]:
    codes, zeros, scales, weight = grouped_weight(bits, group)
    tensors = {
        "x.qweight": np.ascontiguousarray(pack_words(codes.T, bits).T),
        "x.qzeros": pack_words(zeros - (version == "gptq"), bits),
        "x.scales": scales,
        "x.g_idx": (np.arange(IN) // group).astype(np.int32),
    }
    size = -1 if group == IN else group
    config = {"bits": bits, "group_size": size, "desc_act": False, "checkpoint_format": version}
    return tensors, {"quant_method": "gptq", **config}, weight


def awq(group: int) -> tuple[Tensors, dict, np.ndarray]:
    codes, zeros, scales, weight = grouped_weight(4, group)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def words(numbers: np.ndarray) -> np.ndarray:
        return pack_words(
            numbers.reshape(len(numbers), -1, 8)[..., order].reshape(numbers.shape), 4
        )

    tensors = {"x.qweight": words(codes), "x.qzeros": words(zeros), "x.scales": scales}
    config = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return tensors, {"quant_method": "awq", **config}, weight


def compressed(kind: str, bits: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    config = {"format": kind, "config_groups": {"group_0": {"weights": weights}}}
    return {"quant_method": "compressed-tensors", **config}


def opened(folder: pathlib.Path, tensors: Tensors, config: dict) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(encode(tensors))
    file = SafetensorsFile(folder / "model.safetensors")
    return unpacked(Checkpoint([file]), {"quantization_config": config}, "config.json")


BNB = {"quant_method": "bitsandbytes"}
CASES: dict[str, Callable[[], tuple[Tensors, dict, np.ndarray]]] = {
    **{
        case: lambda case=case: (golden(case)[0], BNB, golden(case)[1])
        for case in ("nf4", "nf4_nested", "fp4", "bnb_int8")
    },
    "ct_int8": lambda: (golden("ct_int8")[0], compressed("int-quantized", 8), golden("ct_int8")[1]),
    **{
        f"ct_pack{bits}": lambda bits=bits: (
            golden(f"ct_pack{bits}")[0],
            compressed("pack-quantized", bits),
            golden(f"ct_pack{bits}")[1],
        )
        for bits in (4, 8)
    },
    "gptq": lambda: gptq(4, 32, "gptq"),
    "gptq_v2_8_bits": lambda: gptq(8, IN, "gptq_v2"),
    "awq": lambda: awq(64),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_librarys_to_the_bit(tmp_path: pathlib.Path, case: str) -> None:
    tensors, config, weight = CASES[case]()
    checkpoint = opened(tmp_path, tensors | {"norm.weight": np.ones(3, np.float32)}, config)
    assert set(checkpoint.tensors) == {"x.weight", "norm.weight"}
    assert checkpoint.tensors["x.weight"].shape == weight.shape
    np.testing.assert_array_equal(checkpoint.read("x.weight"), weight)


# Ours have scales by channel, or blocks of 64 along the inputs.
@pytest.mark.parametrize(
    ("case", "name"),
    [("nf4", "nf4"), ("nf4_nested", "nf4"), ("bnb_int8", "int8"), ("ct_int8", "int8x8")],
)
def test_codes_of_our_own_formats_are_kept(tmp_path: pathlib.Path, case: str, name: str) -> None:
    tensors, config, weight = CASES[case]()
    checkpoint = opened(tmp_path, tensors, config)
    assert isinstance(checkpoint, PackedCheckpoint)
    codes = checkpoint.codes_in("x.weight", FORMATS[name])
    assert codes is not None
    assert codes.codes.dtype == FORMATS[name].codes
    kernel = dequantise(Quantised(*map(jnp.asarray, codes)), FORMATS[name])
    # bitsandbytes multiplies int8 codes by their maximum first.
    np.testing.assert_allclose(kernel, weight.T, rtol=2e-7 if case == "bnb_int8" else 0, atol=0)
    assert checkpoint.codes_in("x.weight", FORMATS["int4"]) is None


def hostile(case: str, part: str, value: np.ndarray | None, **config: object) -> tuple:
    tensors, own, _ = CASES[case]()
    changed = {name: a for name, a in tensors.items() if name != part}
    return changed | ({} if value is None else {part: value}), own | config


STATE = "x.weight.quant_state.bitsandbytes__nf4"
HOSTILE = {
    "absmax is missing": lambda: hostile("nf4", "x.weight.absmax", None),
    "expected [16]": lambda: hostile("nf4", "x.weight.absmax", np.ones(15, np.float32)),
    "not valid JSON": lambda: hostile("nf4", STATE, np.frombuffer(b"{", np.uint8)),
    "5000 bytes": lambda: hostile("nf4", STATE, np.full(5000, 32, np.uint8)),
    "blocksize is 63": lambda: hostile("nf4", STATE, state(blocksize=63)),
    "expected [d_out, d_in]": lambda: hostile("nf4", STATE, state(shape=[1 << 40, 1 << 40])),
    "expected [1024, 1]": lambda: hostile("nf4", STATE, state(shape=[16, 128])),
    "quant_type is 'fp4'": lambda: hostile("nf4", STATE, state(quant_type="fp4")),
    "expected [8]": lambda: hostile("bnb_int8", "x.SCB", np.ones(7, np.float32)),
    "act-order": lambda: hostile("gptq", "x.g_idx", np.arange(IN, dtype=np.int32)[::-1] // 32),
    "desc_act is True": lambda: hostile("gptq", "", None, desc_act=True),
    "group_size 1": lambda: hostile("gptq", "", None, group_size=1),
    "expected [4, 2]": lambda: hostile("gptq", "x.qzeros", np.zeros((9, 2), np.int32)),
    "bits is 3": lambda: hostile("awq", "", None, bits=3),
    "version 'gemv'": lambda: hostile("awq", "", None, version="gemv"),
    "only symmetric": lambda: hostile("ct_int8", "x.weight_zero_point", np.zeros(8, np.int8)),
    "weight_shape is": lambda: hostile("ct_pack4", "x.weight_shape", np.array([8, 64])),
    "quant_method 'hqq'": lambda: hostile("awq", "", None, quant_method="hqq"),
    "no layer is quantised": lambda: ({"y": np.ones(2, np.float32)}, BNB),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: pathlib.Path, message: str) -> None:
    tensors, config = HOSTILE[message]()
    with pytest.raises(ConversionError) as caught:
        opened(tmp_path, tensors, config).read("x.weight")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_quantised_llava_is_converted(tmp_path: pathlib.Path) -> None:
    """int8 as bitsandbytes has it, tower and embeddings as they were."""
    plain = {k: a.astype(np.float32) for k, a in write_hf(tmp_path / "in").items()}
    tensors: Tensors = {}
    for key, array in named(plain, Dialect.HF).items():
        if ".layers." in key and key.startswith("language") and key.endswith("_proj.weight"):
            largest = np.abs(array).max(1)
            codes = np.rint(array / largest[:, None] * 127).astype(np.int8)
            tensors |= {key: codes, key.removesuffix("weight") + "SCB": largest}
        else:
            tensors[key] = array
    (tmp_path / "in" / "model.safetensors").unlink()
    write_tensors(tmp_path / "in", tensors)
    edit_config(tmp_path / "in", quantization_config=BNB | {"load_in_8bit": True}, dtype="float32")
    model = open_model(Sources(tmp_path / "in"))
    report = convert(model, tmp_path / "int8", quantize="int8")
    assert set(report.errors.values()) == {0.0}
    convert(model, tmp_path / "plain")
    stem = "decoder.layers.mlp.up_proj."
    codes, scale = (directory.read_array(tmp_path / "int8", stem + part) for part in
                    ("kernel_q", "kernel_scale"))  # fmt: skip
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(codes[1], tensors[key].T)
    kernel = directory.read_array(tmp_path / "plain", stem + "kernel")
    np.testing.assert_allclose(kernel, codes.astype(np.float32) * scale, rtol=2e-7)
    with pytest.raises(ConversionError, match=r"base is quantised \(bitsandbytes\); --merge"):
        open_model(Sources(tmp_path / "in", adapter=tmp_path / "in", merge=True))

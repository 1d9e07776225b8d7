"""Writes `packed_goldens.npz`: layers as bitsandbytes 0.50.2 and compressed-tensors 0.20.1 store
them, with what they make of them again. Run once where both are installed; on a CPU.

    python -m tests.conversion.make_packed_goldens
"""

import pathlib

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.nn import Params4bit


def bitsandbytes_4bit(weight: torch.Tensor, kind: str, nested: bool) -> dict[str, np.ndarray]:
    packed = Params4bit(
        weight, requires_grad=False, quant_type=kind, blocksize=64, compress_statistics=nested
    ).to("cpu")
    if packed.quant_state is None:
        packed = packed._quantize("cpu")
    parts = {
        f"x.weight.{name}": tensor.numpy()
        for name, tensor in packed.quant_state.as_dict(packed=True).items()
    }
    expected = bnb.dequantize_4bit(packed.data, packed.quant_state).float().numpy()
    return {"x.weight": packed.data.numpy(), **parts, "expected": expected}


def bitsandbytes_int8(weight: torch.Tensor) -> dict[str, np.ndarray]:
    codes, maxima, _ = bnb.int8_vectorwise_quant(weight.half())
    expected = bnb.int8_vectorwise_dequant(codes, maxima).numpy()
    return {"x.weight": codes.numpy(), "x.SCB": maxima.numpy(), "expected": expected}


def compressed_tensors(weight: torch.Tensor, bits: int, packed: bool) -> dict[str, np.ndarray]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    codes = quantize(weight, scale, zeros, arguments, dtype=torch.int8)
    expected = dequantize(codes, scale, zeros, arguments).float().numpy()
    stored = {"x.weight_scale": scale.numpy(), "expected": expected}
    if not packed:
        return {"x.weight": codes.numpy(), **stored}
    return {
        "x.weight_packed": pack_to_int32(codes, bits).numpy(),
        "x.weight_shape": np.array(weight.shape),
        **stored,
    }


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    cases = {
        "nf4": bitsandbytes_4bit(weight, "nf4", False),
        "nf4_nested": bitsandbytes_4bit(weight, "nf4", True),
        "fp4": bitsandbytes_4bit(weight, "fp4", False),
        "bnb_int8": bitsandbytes_int8(weight),
        "ct_int8": compressed_tensors(weight, 8, False),
        "ct_pack4": compressed_tensors(weight, 4, True),
        "ct_pack8": compressed_tensors(weight, 8, True),
    }
    flat = {f"{case}/{name}": a for case, parts in cases.items() for name, a in parts.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("packed_goldens.npz"), **flat)


if __name__ == "__main__":
    main()

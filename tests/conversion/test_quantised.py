"""Conversion into fewer bits: codes as the formulas have them, read back, refused where they must
be, and no more than a layer in memory."""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.export import export_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.quantised import quantised_kernels
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.llava import Llava
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import FORMATS, Quantised, dequantise, quantise
from prumerge_jax.models.quantised_weights import stored_format
from prumerge_jax.store import model_directory as directory
from tests.conversion.checkpoints import TINY, stacked, write_hf
from tests.tiny_llava import tokenizer_model

# Its vocabulary holds a tokenizer with all bytes; some of its layers have a block of 64 and a half.
CONFIG: LlavaConfig = dataclasses.replace(
    TINY,
    text=dataclasses.replace(
        TINY.text, width=32, mlp_width=96, head_dim=8, vocab_size=448, max_positions=512
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "in"
    write_hf(folder, CONFIG, dtype="float32")
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def converted(checkpoint: pathlib.Path, folder: pathlib.Path, name: str | None) -> pathlib.Path:
    convert(open_model(Sources(checkpoint)), folder / f"{name}", quantize=name)
    return folder / f"{name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int4"))]
)
def test_codes_errors_and_bytes(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    form = FORMATS[name]
    output = converted(checkpoint, tmp_path, name)
    directory.verify(output)
    assert stored_format(output) == form
    manifest = directory.read_manifest(output)
    facts = json.loads((output / "conversion_report.json").read_text())["quantisation"]
    assert facts == manifest.source["quantisation"]
    assert facts["format"] == name
    tensors = {key: t.read() for key, t in open_model(Sources(checkpoint)).tensors.items()}
    kernels = [w for w in keys.weights(CONFIG) if w.path in facts["relative_rms_error"]]
    assert len(kernels) == 7
    size = 0
    for weight in kernels:
        kernel = jnp.asarray(stacked(weight, tensors))
        expected = quantise(kernel, form)
        stem = weight.path.removesuffix("kernel")
        for part, array in zip(("kernel_q", "kernel_scale"), expected, strict=True):
            stored = directory.read_array(output, stem + part)
            assert stored.dtype == array.dtype
            np.testing.assert_array_equal(stored, np.asarray(array))
            entry = output / "params" / (stem + part)
            size += sum(f.stat().st_size for f in entry.rglob("*") if re.search(r"\d", f.name))
        stacked_values = jnp.stack(
            [dequantise(Quantised(*each), form) for each in zip(*expected, strict=True)]
        )
        error = jnp.sqrt(jnp.square(stacked_values - kernel).sum() / jnp.square(kernel).sum())
        assert facts["relative_rms_error"][weight.path] == pytest.approx(float(error), rel=1e-4)
    assert facts["bytes"] == size
    others = [p for p, a in manifest.arrays.items() if not p.endswith(("kernel_q", "kernel_scale"))]
    assert {str(manifest.arrays[path].dtype) for path in others} == {"float32"}
    assert not any(path.startswith(("vision", "projector")) for path in facts["relative_rms_error"])


@pytest.mark.slow
def test_quantised_on_load_is_quantised_on_conversion(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain, int8 = (converted(checkpoint, tmp_path, name) for name in (None, "int8"))
    ids = [np.arange(3, 40)]
    exact = Llava.load(plain).logits([None], ids)[0]
    model = Llava.load(plain, quantize="int4")
    leaves = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(model._model.state)}
    promised = {p: v for p, v in leaves.items() if p.startswith("decoder.layers") and "proj" in p}
    assert {str(v.dtype) for v in promised.values()} == {"int4", "float32"}
    assert not [p for p in promised if not p.endswith(("kernel_q", "kernel_scale"))]
    # On the device what the files have, a byte for each code: CPUs do not pack them.
    sizes = quantised_kernels(CONFIG.text, FORMATS["int4"])
    codes = sum(v.size for p, v in promised.items() if p.endswith("kernel_q"))
    scales = sum(4 * v.size for p, v in promised.items() if p.endswith("kernel_scale"))
    assert sum(sizes.values()) == codes // 2 + scales
    for name in ("int8", "int8x8"):
        (now,) = Llava.load(plain, quantize=name).logits([None], ids)
        (before,) = Llava.load(int8, quantize=name).logits([None], ids)
        np.testing.assert_array_equal(now, before)
        assert 0 < np.abs(now - exact).max() < 0.2 * np.abs(exact).max()
    (default,) = Llava.load(int8).logits([None], ids)
    np.testing.assert_array_equal(
        default, Llava.load(plain, quantize="int8").logits([None], ids)[0]
    )


def test_what_is_refused(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    int8 = converted(checkpoint, tmp_path, "int8")
    with pytest.raises(ValueError, match=r"holds int8 weights, which cannot become nf4"):
        Llava.load(int8, quantize="nf4")
    with pytest.raises(ValueError, match=r"unknown format 'int9'.*did you mean"):
        Llava.load(int8, quantize="int9")
    with pytest.raises(ConversionError, match=r"holds int8 weights.*export the directory"):
        export_model(int8, tmp_path / "hf", Dialect.HF)

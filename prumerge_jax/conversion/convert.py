"""From an opened checkpoint to a model directory, one stacked weight in memory at a time."""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import OpenedModel
from prumerge_jax.conversion.keys import Weight
from prumerge_jax.conversion.quantised import assemble_quantised, quantised_kernels
from prumerge_jax.conversion.report import Report
from prumerge_jax.conversion.safetensors_io import encode
from prumerge_jax.conversion.tensor_files import ConversionError, Tensor, is_finite
from prumerge_jax.models.quantisation import Format, format_named
from prumerge_jax.models.quantised_weights import CODES, SCALE
from prumerge_jax.store.atomic import require_new, require_space
from prumerge_jax.store.manifest import size_and_sha256
from prumerge_jax.store.model_directory import DirectoryWriter

UNUSED_TOWER_TENSORS = "unused_tower_tensors.safetensors"
REPORT = "conversion_report.json"

# Rows moved at once when a tensor is transposed: few enough for the cache, 5 times faster than
# transposing all at once.
_BLOCK = 64


def convert(
    model: OpenedModel,
    output: str | os.PathLike[str],
    *,
    dtype: np.dtype | None = None,
    quantize: str | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Writes a model directory from a checkpoint.

    Args:
      model: see `checkpoint_reader.open_model`.
      output: the directory to write; it must not exist.
      dtype: dtype of all weights but adapters and quantised ones; None keeps each weight's.
      quantize: format of the kernels of the decoder's layers (`quantisation.FORMATS`); None keeps
        them as they are. Layers are read and quantised one at a time.
      progress: called with the number of checkpoint bytes done since the last call.

    Raises:
      ConversionError: NaN or infinity in a weight, layers of different dtypes, or values that
        `dtype` cannot hold.
      DirectoryError: `output` exists or is being written, or its disk has too little room.
      OSError: a file cannot be read or written.
    """
    table, tensors = keys.weights(model.config), dict(model.tensors)
    form = None if quantize is None else format_named(quantize)
    kernels = quantised_kernels(model.config.text, form)
    dtypes = {
        weight.path: _target_dtype(weight, tensors, dtype)
        for weight in table
        if weight.path not in kernels
    }
    if model.adapter is not None:
        adapters = list(keys.adapter_weights(model.config.text, model.adapter.config.rank))
        tensors.update(model.adapter.tensors)
        dtypes |= {weight.path: _target_dtype(weight, tensors, None) for weight in adapters}
        table += adapters
    require_new(output)
    require_space(
        output,
        sum(math.prod(w.shape) * dtypes[w.path].itemsize for w in table if w.path in dtypes)
        + sum(kernels.values()),
    )
    report = Report(model, quantize=quantize)
    writer = DirectoryWriter(
        output,
        model.config,
        adapter=model.adapter.config if model.adapter else None,
        quantize=quantize,
        source=report.source(),
    )
    with writer, _hashing(model.files) as digests:
        for weight in table:
            if weight.path in kernels:
                assert form is not None  # else there would be none
                nbytes = kernels[weight.path]
                _write_quantised(writer, report, weight, tensors, form, nbytes, progress)
                continue
            array = assemble(weight, tensors, dtypes[weight.path], progress)
            writer.write_array(weight.path, array)
            report.add(weight, tensors, array.dtype)
            del array  # before the next one is allocated
        unused = {key: tensors[key].read() for key in keys.unused_tower_tensors(model.config)}
        writer.write_file(UNUSED_TOWER_TENSORS, encode(unused))
        report.unused_tower_tensors = len(unused)
        progress(sum(array.nbytes for array in unused.values()))
        for path in model.companions:
            writer.write_file(path.name, path)
        report.inputs = {
            f"{path.parent.name}/{path.name}": digest.result()[1]
            for path, digest in digests.items()
        }
        writer.source |= report.quantisation()
        writer.write_file(REPORT, json.dumps(report.to_json(), indent=1).encode())
    return report


def _write_quantised(
    writer: DirectoryWriter,
    report: Report,
    weight: Weight,
    tensors: Mapping[str, Tensor],
    form: Format,
    nbytes: int,
    progress: Callable[[int], None],
) -> None:
    """Writes codes and scales of one kernel, which have so many bytes."""
    stem = weight.path.removesuffix("kernel")
    quantised, error = assemble_quantised(weight, tensors, form, progress)
    writer.write_array(stem + CODES, quantised.codes)
    writer.write_array(stem + SCALE, quantised.scale)
    report.add_quantised(weight, error, nbytes)


def assemble(
    weight: Weight,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Reads the checkpoint tensors of one weight into one array of our layout.

    Raises:
      ConversionError: NaN or infinity among the values, or some that `dtype` cannot hold.
    """
    result = np.empty(weight.shape, dtype)
    parts = [result] if weight.num_layers is None else result
    for key, part in zip(weight.keys, parts, strict=True):
        tensor = tensors[key].read()
        progress(tensors[key].info.nbytes)
        copy_blocked(weight.transform.checkpoint_view(part), cast(tensor, dtype, key))
    return result


def _target_dtype(
    weight: Weight, tensors: Mapping[str, Tensor], dtype: np.dtype | None
) -> np.dtype:
    """Dtype in which a weight is stored: `dtype`, or the one that all of its layers have."""
    if dtype is not None:
        return dtype
    dtypes = {str(tensors[key].info.dtype) for key in weight.keys}
    if len(dtypes) > 1:
        raise ConversionError(
            f"{weight.path}: its layers are stored as {' and '.join(sorted(dtypes))}; "
            "choose one with --dtype"
        )
    return tensors[weight.keys[0]].info.dtype


@contextlib.contextmanager
def _hashing(
    files: Iterable[pathlib.Path],
) -> Iterator[dict[pathlib.Path, concurrent.futures.Future[tuple[int, str]]]]:
    """Size and SHA-256 of files, computed concurrently; an exception does not wait for them."""
    hasher = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        yield {path: hasher.submit(size_and_sha256, path) for path in files}
    finally:
        hasher.shutdown(cancel_futures=True)


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to nearest even.

    Raises:
      ConversionError: a value overflows `dtype`.
    """
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if not is_finite(result):
        largest = np.abs(tensor).max()
        raise ConversionError(f"{name}: values up to {largest} overflow {dtype}")
    return result


def copy_blocked(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` for arrays of which one is a transposed view."""
    for start in range(0, len(source), _BLOCK):
        target[start : start + _BLOCK] = source[start : start + _BLOCK]

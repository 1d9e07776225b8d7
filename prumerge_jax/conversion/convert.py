"""From an opened checkpoint to a model directory, one stacked weight in memory at a time."""

import concurrent.futures
import json
import os
from collections.abc import Callable, Mapping

import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import OpenedModel
from prumerge_jax.conversion.keys import Weight
from prumerge_jax.conversion.report import Report
from prumerge_jax.conversion.safetensors_io import encode
from prumerge_jax.conversion.tensor_files import CheckpointError, Tensor, is_finite
from prumerge_jax.store.manifest import size_and_sha256
from prumerge_jax.store.model_directory import DirectoryWriter

PASSTHROUGH = "passthrough.safetensors"
REPORT = "conversion_report.json"

# Rows moved at once when a tensor is transposed: few enough for the cache, 5 times faster than
# transposing the whole.
_BLOCK = 64


def convert(
    model: OpenedModel,
    output: str | os.PathLike[str],
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Writes a model directory from a checkpoint.

    Args:
      model: see `inputs.open_model`.
      output: the directory to write; it must not exist.
      dtype: of all weights but adapters; None keeps each weight's own.
      progress: called with the number of checkpoint bytes done since the last call.

    Raises:
      CheckpointError: NaN or infinity in a weight, layers of different dtypes, or values that
        `dtype` cannot hold.
      DirectoryError: `output` exists or is being written.
    """
    table, tensors = keys.weights(model.config), dict(model.tensors)
    if model.adapter is not None:
        table += keys.adapter_weights(model.config.text, model.adapter.config.rank)
        tensors.update(model.adapter.tensors)
    report = Report(model)
    with (
        DirectoryWriter(
            output,
            model.config,
            adapter=model.adapter.config if model.adapter else None,
            source=report.source(),
        ) as writer,
        concurrent.futures.ThreadPoolExecutor(max_workers=1) as hasher,
    ):
        digests = {path: hasher.submit(size_and_sha256, path) for path in model.files}
        for weight in table:
            keep = model.adapter is not None and weight.keys[0] in model.adapter.tensors
            array = assemble(weight, tensors, None if keep else dtype, progress)
            writer.write_array(weight.path, array)
            report.add(weight, tensors, array.dtype)
            del array  # before the next one is allocated
        unused = {key: tensors[key].read() for key in keys.passthrough(model.config.vision)}
        writer.write_file(PASSTHROUGH, encode(unused))
        report.kept_aside = len(unused)
        progress(sum(array.nbytes for array in unused.values()))
        for path in model.companions:
            writer.write_file(path.name, path)
        report.inputs = {
            f"{path.parent.name}/{path.name}": digest.result()[1]
            for path, digest in digests.items()
        }
        writer.write_file(REPORT, json.dumps(report.to_json(), indent=1).encode())
    return report


def assemble(
    weight: Weight,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype | None,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Reads the tensors behind one weight into one array of our layout.

    Raises:
      CheckpointError: see `convert`.
    """
    dtypes = {str(tensors[key].info.dtype) for key in weight.keys}
    if dtype is None and len(dtypes) > 1:
        raise CheckpointError(
            f"{weight.path}: its layers are stored as {' and '.join(sorted(dtypes))}; "
            "choose one with --dtype"
        )
    target = tensors[weight.keys[0]].info.dtype if dtype is None else dtype
    result = np.empty(weight.shape, target)
    parts = [result] if weight.num_layers is None else result
    for key, part in zip(weight.keys, parts, strict=True):
        tensor = tensors[key].read()
        progress(tensors[key].info.nbytes)
        copy_blocked(weight.transform.inverse(part), cast(tensor, target, key))
    return result


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to nearest even.

    Raises:
      CheckpointError: a value overflows `dtype`.
    """
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if not is_finite(result):
        largest = np.abs(tensor).max()
        raise CheckpointError(f"{name}: values up to {largest} overflow {dtype}")
    return result


def copy_blocked(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` for arrays of which one is a transposed view."""
    for start in range(0, len(source), _BLOCK):
        target[start : start + _BLOCK] = source[start : start + _BLOCK]

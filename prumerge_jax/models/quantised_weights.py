"""Quantised kernels from model directories, whether they hold them or what they are made of."""

import os
from collections.abc import Collection, Mapping, Sequence

import jax

from prumerge_jax.models.config import TextConfig, decoder_linears
from prumerge_jax.models.quantisation import FORMATS, Format, Quantised, format_named, quantise
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.manifest import StoredArray

CODES, SCALE = "kernel_q", "kernel_scale"
"""What `Linear` calls the two parts of a quantised kernel."""


def stored_format(directory: str | os.PathLike[str]) -> Format | None:
    """The format of a directory's quantised kernels, None where it holds none.

    Raises:
      DirectoryError: no finished model directory, or its `config.json` was altered.
      ValueError: a format that this version does not know.
    """
    name = directories.read_sections(directory).get("quantize")
    if name is None:
        return None
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(
            f"{directory}/{directories.CONFIG}: quantize is {name!r:.80}; expected one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name]


def chosen_format(directory: str | os.PathLike[str], quantize: str | None) -> Format | None:
    """The format to compute in: the asked one, by default the directory's.

    Raises:
      ValueError: an unknown format, or one that the directory's kernels cannot be brought into.
      DirectoryError: as `stored_format`.
    """
    stored = stored_format(directory)
    if quantize is None:
        return stored
    form = format_named(quantize)
    if stored is not None and stored.stored_as != form.stored_as:
        raise ValueError(
            f"{directory} holds {stored.name} weights, which cannot become {form.name}: quantise "
            "the original weights, or leave quantize out"
        )
    return form


def to_quantise(
    wanted: Collection[str], stored: Mapping[str, StoredArray]
) -> dict[str, tuple[str, str]]:
    """The stored kernels that are to become codes and scales, with the paths of both."""
    stems = (path.removesuffix(CODES) for path in wanted if path.endswith(f".{CODES}"))
    return {
        f"{stem}kernel": (stem + CODES, stem + SCALE) for stem in stems if f"{stem}kernel" in stored
    }


def read_weights(
    directory: str | os.PathLike[str],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    form: Format | None,
) -> dict[str, jax.Array]:
    """Every weight straight into its shards, as `store.load_arrays`; kernels are quantised one
    after the other on their devices where the directory holds them unquantised.

    Args:
      directory: a model directory.
      targets: shape, dtype and sharding by path; of a quantised model.
      form: its format; None for a model without.

    Raises:
      DirectoryError: as `store.load_arrays`.
    """
    stored = directories.read_manifest(directory).arrays
    kernels = to_quantise(targets, stored)
    made = {part for parts in kernels.values() for part in parts}
    read = {path: target for path, target in targets.items() if path not in made}
    for kernel, (codes, _) in kernels.items():
        read[kernel] = _as_stored(targets[codes], stored[kernel])
    directories.check_arrays(directory, read)
    weights: dict[str, jax.Array] = {}
    for path, target in read.items():
        if path not in kernels:
            weights[path] = directories.load_array(directory, path, target)
            continue
        assert form is not None  # there would be no codes among the targets
        parts = [targets[part] for part in kernels[path]]
        weights.update(zip(kernels[path], _load(directory, path, target, parts, form), strict=True))
    return weights


def load_quantised(
    directory: str | os.PathLike[str],
    path: str,
    parts: Sequence[jax.ShapeDtypeStruct],
    form: Format,
) -> Quantised:
    """One stored kernel as codes and scales.

    Args:
      directory: a model directory.
      path: of the kernel.
      parts: shape and sharding of the codes and of the scales.
      form: their format.
    """
    target = _as_stored(parts[0], directories.read_manifest(directory).arrays[path])
    return _load(directory, path, target, parts, form)


def _as_stored(codes: jax.ShapeDtypeStruct, stored: StoredArray) -> jax.ShapeDtypeStruct:
    """A kernel before it becomes these codes."""
    return jax.ShapeDtypeStruct(codes.shape, stored.dtype, sharding=codes.sharding)


def _load(
    directory: str | os.PathLike[str],
    path: str,
    target: jax.ShapeDtypeStruct,
    parts: Sequence[jax.ShapeDtypeStruct],
    form: Format,
) -> Quantised:
    kernel = directories.load_array(directory, path, target)
    quantised = _quantise(kernel, form=form)
    if parts[0].sharding is not None:
        quantised = jax.device_put(quantised, Quantised(*(part.sharding for part in parts)))
    jax.block_until_ready(quantised)
    kernel.delete()
    return quantised


_quantise = jax.jit(quantise, static_argnames="form")


def check_blocks(text: TextConfig, form: Format | None, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where devices would share a block of weights.

    Args:
      text: sizes of the decoder.
      form: format of its kernels.
      mesh: sizes of the mesh's axes.
    """
    if form is None or form.block is None:
        return
    for name, (d_in, _) in decoder_linears(text).items():
        axis = "tensor" if name in ("o_proj", "down_proj") else "fsdp"
        if mesh[axis] > 1 and d_in % (form.block * mesh[axis]):
            raise ValueError(
                f"{name} has {form.groups(d_in)} blocks of {form.block} inputs in {form.name}, "
                f"which do not divide over {axis}={mesh[axis]}; expected a divisor, or int8"
            )

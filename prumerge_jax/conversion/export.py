"""From a model directory back to PyTorch's checkpoints, one stacked weight in memory at a time."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from prumerge_jax.conversion import hf_files as outputs
from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import TEXT_FILES
from prumerge_jax.conversion.convert import REPORT, UNUSED_TOWER_TENSORS, cast, copy_blocked
from prumerge_jax.conversion.keys import Dialect, Weight
from prumerge_jax.conversion.peft import merged
from prumerge_jax.conversion.safetensors_io import SafetensorsFile, ShardedWriter
from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo
from prumerge_jax.conversion.tokenizer_file import BPE_TOKENIZER, TOKENIZER
from prumerge_jax.conversion.torch_bin import encode
from prumerge_jax.families import family_of
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig, decoder_linears
from prumerge_jax.models.quantised_weights import stored_format
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.atomic import StagedDirectory, require_new, require_space

Progress = Callable[[int], None]

# llava-hf's vocabulary: the tokenizer's pieces, <image>, <pad>, filled up to a multiple of 64.
_VOCABULARY_MULTIPLE = 64
_VOCABULARY = ("language_model.embed_tokens.weight", "lm_head.weight")
# The name of `UNUSED_TOWER_TENSORS` in directories of format version 1.
_VERSION_1_UNUSED = "passthrough.safetensors"
# PEFT matches lists by suffix, which on a LLaVA of transformers would hit CLIP's projections too.
_HF_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


class StoredModel:
    """A model directory whose weights are read one by one, as checkpoint tensors."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Verifies the directory, every hash, and reads its config and manifest.

        Raises:
          DirectoryError: not a finished model directory, or damaged.
        """
        directories.verify(folder)
        self.folder = folder
        self.config = config_json.read_config(folder)
        self.adapter = config_json.read_adapter(folder)
        self.manifest = directories.read_manifest(folder)

    def dtype(self, weight: Weight) -> np.dtype:
        """Dtype of one weight, as stored.

        Raises:
          ConversionError: the directory lacks it.
        """
        if weight.path not in self.manifest.arrays:
            raise ConversionError(f"{self.folder} lacks the weight {weight.path}")
        return self.manifest.arrays[weight.path].dtype

    def tensors(self, weight: Weight) -> Iterator[tuple[str, np.ndarray]]:
        """The checkpoint tensors of one weight, by canonical key."""
        array = directories.read_array(self.folder, weight.path)
        parts = [array] if weight.num_layers is None else array
        for key, part in zip(weight.keys, parts, strict=True):
            view = weight.transform.checkpoint_view(part)
            tensor = np.empty(view.shape, view.dtype)
            copy_blocked(tensor, view)
            yield key, tensor

    def unused_file(self) -> pathlib.Path | None:
        """The file of those tensors, None in a model that never had them."""
        files = (self.folder / name for name in (UNUSED_TOWER_TENSORS, _VERSION_1_UNUSED))
        return next((file for file in files if file.is_file()), None)

    def unused(self) -> dict[str, np.ndarray]:
        """The tower's tensors that LLaVA never uses; zeros in a model that never had them."""
        file = self.unused_file()
        shapes = keys.unused_tower_tensors(self.config)
        if file is None:
            dtype = self.manifest.arrays["vision.position_embedding"].dtype
            return {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
        source = SafetensorsFile(file)
        matched = keys.assign(source.tensors, Dialect.HF, shapes, str(file))
        return {key: source.read(own) for key, own in matched.key_of.items()}


def export_model(
    folder: pathlib.Path,
    output: pathlib.Path,
    dialect: Dialect,
    *,
    merge: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Writes a checkpoint that transformers (HF) or the original LLaVA code (LLAVA) loads.

    A vocabulary without image token gets llava-hf's two tokens, new rows being the mean of the
    others; the original layout drops the rows from the image token on. Every other tensor keeps
    its bits.

    Args:
      folder: a model directory.
      output: must not exist.
      dialect: HF or LLAVA.
      merge: add adapters to the weights; needed if there are any.
      max_shard_bytes: size of a file.
      progress: called with the number of bytes written since the last call.

    Raises:
      ConversionError: the dialect cannot hold the model.
      DirectoryError: `folder` is not a model directory, or `output` exists.
    """
    require_new(output)
    if form := stored_format(folder):
        reason = "adapters are merged into the unquantised base alone" if merge else "it is ours"
        raise ConversionError(
            f"{folder} holds {form.name} weights, which no other library reads, and {reason}: "
            "export the directory that it was quantised from"
        )
    adapter = config_json.read_adapter(folder)  # before every file is hashed
    if adapter is None and merge:
        raise ConversionError(f"{folder} holds no adapters: leave --merge out")
    if adapter is not None and not merge:
        raise ConversionError(f"{folder} holds adapters: use --merge, or --to=peft")
    model = StoredModel(folder)
    if dialect is Dialect.LLAVA and model.config.family != "llava_1_5":
        raise ConversionError(
            f"{folder} is a {family_of(model.config).title}, which --to=hf writes; --to=llava is "
            "for LLaVA-1.5"
        )
    config = (_with_image_token if dialect is Dialect.HF else _without_image_token)(model.config)
    files = _hf_files(config) if dialect is Dialect.HF else _llava_files(config)
    table, unused = keys.weights(model.config), model.unused()
    resized = keys.expected_shapes(keys.weights(config))
    infos = {
        keys.dialect_key(key, dialect, config): TensorInfo(resized[key], model.dtype(weight))
        for weight in table
        for key in weight.keys
    }
    infos |= {
        keys.dialect_key(key, dialect, config): TensorInfo(tensor.shape, tensor.dtype)
        for key, tensor in unused.items()
    }
    require_space(output, sum(info.nbytes for info in infos.values()))
    with StagedDirectory(output) as staged:
        writer = ShardedWriter(staged.path, infos, max_shard_bytes)
        for weight in table:
            for key, tensor in _with_adapter(model, weight):
                if key in _VOCABULARY:
                    tensor = _resize(tensor, config.text.vocab_size)
                writer.write(keys.dialect_key(key, dialect, config), tensor)
                progress(tensor.nbytes)
        for key, tensor in unused.items():
            writer.write(keys.dialect_key(key, dialect, config), tensor)
            progress(tensor.nbytes)
        writer.finish()
        if (folder / BPE_TOKENIZER).is_file() and not (folder / TOKENIZER).is_file():
            del files["tokenizer_config.json"]  # it would describe LLaMA's
        _write_files(staged.path, files)
        if config == model.config:  # else tokens were added or dropped
            _copy_text_files(folder, staged.path, TEXT_FILES)
        else:
            _copy_text_files(folder, staged.path, (TOKENIZER,))
        _write_files(staged.path, {REPORT: _report(model, config, len(infos), merge)})


def export_adapter(folder: pathlib.Path, output: pathlib.Path, *, base: str | None = None) -> None:
    """Writes adapters and projector as PEFT and the original LLaVA code load them.

    Keys follow the model the adapter belongs on: llava-hf's where the vocabulary has an image
    token, the original ones where it has not.

    Args:
      folder: a model directory with adapters.
      output: must not exist.
      base: name of the model the adapter belongs on; by default what the directory knows.

    Raises:
      ConversionError: the directory holds no adapters.
      DirectoryError: `folder` is not a model directory, or `output` exists.
    """
    require_new(output)
    adapter = config_json.read_adapter(folder)  # before every file is hashed
    if adapter is None:
        raise ConversionError(f"{folder} holds no adapters: use --to=hf or --to=llava")
    model = StoredModel(folder)
    config = model.config
    is_hf = config.image_token_id is not None
    names = sorted(decoder_linears(config.text))
    declared = base or model.manifest.source.get("adapter_base") or None
    table = list(keys.adapter_weights(config.text, adapter.rank))
    infos = {
        _peft_key(key, is_hf, config): TensorInfo(weight.tensor_shape, model.dtype(weight))
        for weight in table
        for key in weight.keys
    }
    projector = {
        _peft_key(key, is_hf, config): tensor
        for weight in keys.projector_weights(config)
        for key, tensor in model.tensors(weight)
    }
    files = {
        "adapter_config.json": outputs.adapter_config(
            adapter.rank,
            adapter.alpha,
            adapter.dropout,
            declared,
            _HF_TARGETS if is_hf else names,
        )
    }
    if not is_hf:  # the original code reads the LLaVA's config from here
        files["config.json"] = outputs.llava_config(config) | {"unfreeze_mm_vision_tower": False}
    with StagedDirectory(output) as staged:
        writer = ShardedWriter(staged.path, infos, max_shard_bytes=1 << 62, stem="adapter_model")
        for weight in table:
            for key, tensor in model.tensors(weight):
                writer.write(_peft_key(key, is_hf, config), tensor)
        writer.finish()
        (staged.path / "non_lora_trainables.bin").write_bytes(encode(projector))
        _write_files(staged.path, files)


def _with_adapter(model: StoredModel, weight: Weight) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint tensors of one weight, its adapter added if it has one."""
    stem = weight.path.removesuffix(".kernel")
    if model.adapter is None or f"{stem}.lora_a" not in model.manifest.arrays:
        yield from model.tensors(weight)
        return
    a, b = (directories.read_array(model.folder, f"{stem}.{name}") for name in ("lora_a", "lora_b"))
    for (key, tensor), lora_a, lora_b in zip(model.tensors(weight), a, b, strict=True):
        total = merged(tensor, lora_a.T, lora_b.T, model.adapter.scale)
        yield key, cast(total, tensor.dtype, key)


def _with_image_token(config: LlavaConfig) -> LlavaConfig:
    if config.image_token_id is not None:
        return config
    if family_of(config).video is not None:
        raise ConversionError(
            f"the model is an original {family_of(config).title} without ids for images and "
            "videos, which --to=hf needs; convert a checkpoint of transformers"
        )
    image = config.text.vocab_size
    rows = -(-(image + 2) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    text = dataclasses.replace(config.text, vocab_size=rows)
    return dataclasses.replace(config, text=text, image_token_id=image, pad_token_id=image + 1)


def _without_image_token(config: LlavaConfig) -> LlavaConfig:
    image = config.image_token_id
    if image is None:
        return config
    dropped = config.text.vocab_size - image
    if dropped > _VOCABULARY_MULTIPLE + 1:
        raise ConversionError(
            f"the image token {image} is followed by {dropped} rows of vocabulary, more than "
            "<image>, <pad> and filling: dropping them would drop words"
        )
    text = dataclasses.replace(config.text, vocab_size=image)
    return dataclasses.replace(config, text=text, image_token_id=None, pad_token_id=None)


def _resize(tensor: np.ndarray, rows: int) -> np.ndarray:
    """[V, D] -> [rows, D]: cut, or filled with the mean row."""
    if rows <= len(tensor):
        return tensor[:rows]
    mean = tensor.mean(axis=0, dtype=np.float32).astype(tensor.dtype)
    return np.concatenate([tensor, np.broadcast_to(mean, (rows - len(tensor), len(mean)))])


def _hf_files(config: LlavaConfig) -> dict[str, dict[str, Any]]:
    return {
        "config.json": outputs.hf_config(config),
        "generation_config.json": outputs.generation_config(config),
        "preprocessor_config.json": outputs.image_processor(config),
        "processor_config.json": outputs.processor(config),
        "tokenizer_config.json": outputs.tokenizer_config(config),
    }


def _llava_files(config: LlavaConfig) -> dict[str, dict[str, Any]]:
    return {
        "config.json": outputs.llava_config(config),
        "generation_config.json": outputs.generation_config(config),
        "preprocessor_config.json": outputs.image_processor(config),
        "tokenizer_config.json": outputs.tokenizer_config(config),
        # Sizes of the tower, which the original config does not hold. Where they are not those of
        # OpenAI's, this folder is given as `--vision_tower` when the directory is read again.
        "vision_tower/config.json": outputs.clip_config(config.vision),
        "vision_tower/preprocessor_config.json": outputs.image_processor(config),
    }


def _write_files(folder: pathlib.Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")


def _copy_text_files(source: pathlib.Path, target: pathlib.Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _peft_key(canonical: str, is_hf: bool, config: LlavaConfig) -> str:
    if is_hf:  # the names of modules in transformers >= 4.52
        return f"base_model.model.model.{canonical}"
    return f"base_model.model.{keys.dialect_key(canonical, Dialect.LLAVA, config)}"


def _report(model: StoredModel, config: LlavaConfig, tensors: int, merge: bool) -> dict[str, Any]:
    before, after = model.config.text.vocab_size, config.text.vocab_size
    rows = f"{before} rows kept"
    if after != before:
        change = "dropped from the end" if after < before else "added, each the mean of the others"
        rows = f"{before} -> {after} rows, {change}"
    stored = model.unused_file() is not None
    return {
        "tensors_out": tensors,
        "vocabulary": rows,
        "adapters_merged": merge and model.adapter is not None,
        "unused_tower_tensors": "as in the source" if stored else "zeros: the model never had them",
        "source": dict(model.manifest.source),
    }

"""A converted directory, read onto devices."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from prumerge_jax import sharding
from prumerge_jax.data.tokenizer import (
    BPE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
    tokenizer_file,
)
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import abstract_model, inference_layout
from prumerge_jax.models.quantisation import Format, QuantParam
from prumerge_jax.models.quantised_weights import check_blocks, chosen_format, read_weights
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.manifest import MANIFEST


def load_model(
    root: pathlib.Path,
    *,
    dtype: jnp.dtype | None,
    mesh: Mesh | None,
    quantize: str | None,
    cache_dtype: jnp.dtype | None,
) -> tuple[PlacedModel, Tokenizer]:
    """A directory's weights on their devices, and its tokenizer.

    Args:
      root: the directory.
      dtype, mesh, quantize, cache_dtype: as in `Llava.load`, which says what is raised.
    """
    if (root / MANIFEST).is_file() and not tokenizer_file(root).is_file():
        raise directories.DirectoryError(
            f"{root}: no {SENTENCEPIECE_FILE}; copy there the one of the LLaVA that it was "
            f"trained from, or the {BPE_FILE} of a Qwen or Llama-3"
        )
    directories.verify(root)
    config = config_json.read_config(root)
    tokenizer = load_tokenizer(tokenizer_file(root))
    check_vocabulary(tokenizer, config)
    model = _read_weights(root, config, dtype, mesh, chosen_format(root, quantize))
    return dataclasses.replace(model, cache_dtype=cache_dtype), tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: LlavaConfig) -> None:
    """Raises ValueError for a tokenizer with more pieces than the model has embeddings."""
    if tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's embedding "
            f"{config.text.vocab_size} rows; they do not belong together"
        )


def _read_weights(
    root: pathlib.Path,
    config: LlavaConfig,
    dtype: jnp.dtype | None,
    mesh: Mesh | None,
    form: Format | None,
) -> PlacedModel:
    """Reads a verified directory, each weight straight into its shards."""
    graphdef, abstract = abstract_model(config, config_json.read_adapter(root), form)
    if mesh is not None:
        check_blocks(config.text, form, mesh.shape)
    stored = directories.read_manifest(root).arrays
    compute = dtype or jnp.dtype(stored["decoder.embed_tokens"].dtype)
    shardings = None if mesh is None else sharding.weight_shardings(abstract, mesh)
    placed = {} if shardings is None else dict(nnx.to_flat_state(shardings))
    leaves = dict(nnx.to_flat_state(abstract))
    targets = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype if isinstance(leaf, QuantParam) else compute,
            sharding=placed[path].get_value() if path in placed else None,
        )
        for path, leaf in leaves.items()
    }
    arrays = read_weights(root, targets, form)
    state = nnx.from_flat_state(
        {path: leaf.replace(arrays[".".join(map(str, path))]) for path, leaf in leaves.items()}
    )
    with sharding.use_mesh(mesh):
        graphdef, state = inference_layout(graphdef, state)
    return PlacedModel(graphdef, state, config, compute, mesh)

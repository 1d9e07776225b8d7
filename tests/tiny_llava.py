"""Tiny random LLaVAs, in memory and on disk with a tokenizer, made without compiling anything."""

import dataclasses
import functools
import io
import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from prumerge_jax.models.config import LlavaConfig, TextConfig, published
from prumerge_jax.models.llava import LlavaModel, abstract_model
from prumerge_jax.store.model_directory import DirectoryWriter

CONFIG = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=512, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=512,
    ),
    image_token_id=None,
    pad_token_id=None,
)  # fmt: skip


def tokenizer_model(pieces: int = 400) -> bytes:
    """A SentencePiece model of LLaMA's kind, trained on a few sentences."""
    sentences = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: What is this? ASSISTANT: It is a cat on a table near the window.",
        "USER: How many digits are there? ASSISTANT: There are three of them, 4 7 and 9.",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def random_weights(
    config: LlavaConfig, seed: int = 0, gain: float = 1.0
) -> dict[tuple[str | int, ...], np.ndarray]:
    """Weights by path, float32: matrices keep the variance of their input, times `gain` squared."""
    rng = np.random.default_rng(seed)
    weights = {}
    for path, variable in nnx.to_flat_state(abstract_model(config)[1]):
        weight = rng.normal(size=variable.shape)
        match path[-1]:
            case "kernel":
                weight *= gain * np.prod(variable.shape[-2:-1]) ** -0.5
            case "scale":
                weight = 1 + 0.02 * weight
            case _:
                weight *= 0.02
        weights[path] = weight.astype(np.float32)
    return weights


def random_llava(config: LlavaConfig, seed: int = 0, gain: float = 1.0) -> LlavaModel:
    """A model with `random_weights` on the default device."""
    graphdef, state = abstract_model(config)
    weights = random_weights(config, seed, gain)
    flat = {
        path: variable.replace(jnp.asarray(weights[path]))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def write_tiny_llava(
    directory: pathlib.Path, config: LlavaConfig = CONFIG, seed: int = 0, gain: float = 1.5
) -> pathlib.Path:
    """Writes a converted directory with random weights; `gain` makes answers differ."""
    return pathlib.Path(
        shutil.copytree(pathlib.Path(_written(config, seed, gain).name, "model"), directory)
    )


@functools.cache
def _written(config: LlavaConfig, seed: int, gain: float) -> tempfile.TemporaryDirectory:
    """The directory as it is first written, once in a process; copying it takes far less."""
    folder = tempfile.TemporaryDirectory()
    with DirectoryWriter(pathlib.Path(folder.name, "model"), config) as writer:
        for path, weight in random_weights(config, seed, gain).items():
            writer.write_array(".".join(map(str, path)), weight)
        writer.write_file("tokenizer.model", tokenizer_model())
    return folder

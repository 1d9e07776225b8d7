"""A tiny random LLaVA on disk, tokenizer included, for tests that start from a directory."""

import dataclasses
import io
import pathlib

import numpy as np
import sentencepiece
from flax import nnx

from prumerge_jax.models.config import LlavaConfig, TextConfig, published
from prumerge_jax.models.llava import random_model
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


def write_tiny_llava(
    directory: pathlib.Path, config: LlavaConfig = CONFIG, seed: int = 0, gain: float = 1.5
) -> pathlib.Path:
    """Writes a converted directory with random weights; `gain` makes answers differ."""
    model = random_model(config, seed)
    with DirectoryWriter(directory, config) as writer:
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            scale = gain if path[-1] == "kernel" else 1.0
            writer.write_array(".".join(map(str, path)), np.asarray(variable[...]) * scale)
        writer.write_file("tokenizer.model", tokenizer_model())
    return directory

"""A SentencePiece model of LLaMA's kind, small and trained on the spot."""

import pathlib

import pytest
import sentencepiece

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A black cat on a mat, and two dogs.",
    "Answer the question using a single word or phrase. USER: Is there a cat? ASSISTANT: Yes.",
]


def train_model(path: pathlib.Path, **options) -> pathlib.Path:
    """Trains a model with LLaMA's settings, but for `options`; `path` is without `.model`."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(path), **(settings | options)
    )
    return path.with_suffix(".model")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return train_model(tmp_path_factory.mktemp("sentencepiece") / "small")

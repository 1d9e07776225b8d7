"""What the tests of the miniature share: its tokenizer."""

import pytest

from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import tokenizer as digits_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(digits_tokenizer.build_for_digits())
    return SentencePieceTokenizer(file)

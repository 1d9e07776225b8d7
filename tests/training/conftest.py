"""What the tests of training share: a tiny model and synthetic samples."""

import numpy as np
import pytest

from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.digits import tokenizer as digits_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(digits_tokenizer.build_for_digits())
    return SentencePieceTokenizer(file)


def make_examples(
    count: int, *, image_size: int, vocabulary: int, seed: int = 0, text_only: tuple[int, ...] = ()
) -> list[Example]:
    """Random images and token ids; about half of the text is to be learned."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        has_image = index not in text_only
        text = rng.integers(3, vocabulary, rng.integers(6, 14)).astype(np.int32)
        labels = np.where(rng.random(text.size) < 0.5, text, IGNORE).astype(np.int32)
        labels[-1] = text[-1]
        if has_image:
            place = int(rng.integers(1, 4))
            text = np.insert(text, place, IMAGE_TOKEN)
            labels = np.insert(labels, place, IGNORE)
        shape = (image_size, image_size, 3)
        pixels = rng.integers(0, 256, shape, np.uint8) if has_image else np.zeros(shape, np.uint8)
        examples.append(
            Example(
                id=f"sample {index}",
                pixels=pixels,
                has_image=has_image,
                token_ids=text,
                labels=labels,
                mismatch=False,
            )
        )
    return examples

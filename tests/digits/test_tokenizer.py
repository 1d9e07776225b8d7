"""The vocabulary of the miniature."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prumerge_jax.data.conversation import label_mask
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import TEMPLATES
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.digits.benchmark import Digits
from tests.prompts import evaluation_prompt

BYTE_PIECES = range(3, 3 + 256)
NEWLINE = BYTE_PIECES[ord("\n")]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(digits_tokenizer.build_for_digits())
    return file


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    return SentencePieceTokenizer(tokenizer_file)


def test_the_model_is_small_always_the_same_and_numbered_like_llamas(tokenizer) -> None:
    assert digits_tokenizer.build_for_digits() == digits_tokenizer.build_for_digits()
    assert tokenizer.vocab_size - BYTE_PIECES.stop < 100
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("\n")[1:] == [NEWLINE]


def test_answers_and_places_are_one_token_each(tokenizer) -> None:
    words = [*digits.PLACES, *"0123456789", "yes", "no", "A", "B"]
    ids = [tokenizer.encode(word) for word in words]
    assert [len(word_ids) for word_ids in ids] == [1] * len(words)
    assert len({word_ids[0] for word_ids in ids}) == len(words)


def test_the_benchmark_lets_a_response_end(tokenizer) -> None:
    responses = [
        question.response
        for index in range(200)
        for question in digits_questions.draw_with_questions("test", index, seed=0)[1]
    ]
    longest = max(len(tokenizer.encode(response)) for response in responses)
    assert longest + 1 == Digits.max_new_tokens  # and the token that ends it


def test_prompts_are_one_token_per_word_and_mark(tokenizer) -> None:
    for text in digits_questions.vocabulary_texts():
        prompt = evaluation_prompt(TEMPLATES["vicuna_v1"], text)
        ids = tokenizer.encode_prompt(prompt)
        assert {token for token in ids if token in BYTE_PIECES} == {NEWLINE}, text
        # In addition: BOS, and the lone spaces before and after the image.
        expected = 3 + len(re.findall(r"<image>|[A-Za-z]+|[0-9]|[^\w\s]|\n", prompt))
        assert len(ids) == expected, text
        assert ids.count(IMAGE_TOKEN) == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example("<s>")
def test_any_text_survives(tokenizer, text: str) -> None:
    # The spelling of a special token is that token, which decoding leaves out.
    text = re.sub("</?s>|<unk>", " ", text.replace("\u2581", " ").replace("\0", ""))
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text.strip()


@pytest.mark.parametrize("style", ["4.31", "4.37"])
def test_rounds_are_labelled_in_either_tokenizer_style(tokenizer_file, style) -> None:
    tokenizer = SentencePieceTokenizer(tokenizer_file, style)
    turns = ["<image>\nIs there a 3?", "yes", "How many digits are there?", "2"]
    roles = ["human", "gpt"] * 2
    sample = {
        "id": "two rounds",
        "image": b"",
        "conversations": [
            {"from": role, "value": turn} for role, turn in zip(roles, turns, strict=True)
        ],
    }
    labelled = label_mask(tokenizer, sample, TEMPLATES["vicuna_v1"], "prumerge")
    answers = [*tokenizer.encode("yes"), tokenizer.eos_id, *tokenizer.encode("2"), tokenizer.eos_id]
    assert labelled.labels[labelled.labels >= 0].tolist() == answers

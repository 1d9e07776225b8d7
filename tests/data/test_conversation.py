import functools
import gzip
import hashlib
import json
import pathlib
import shutil
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data.conversation import SampleError, label_mask, label_rounds, sample_turns
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import TEMPLATES, training_prompt
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from tests.prompts import evaluation_prompt

VICUNA = TEMPLATES["vicuna_v1"]
PLAIN = TEMPLATES["plain"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
PUBLISHED_PAIRS = [("4.31", "prumerge"), ("4.37", "llava-1.2")]
words = st.lists(st.sampled_from(["a", "cat", "12", "What?", "is", "yes,"]), min_size=1).map(
    " ".join
)


def conversation(*turns: str, image: bool = True, **fields) -> dict:
    roles = ("human", "gpt")
    entries = [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]
    sample = {"id": "s1", "conversations": entries} | ({"image": "1.jpg"} if image else {})
    return sample | fields


# ---- templates ----


def test_evaluation_prompts():
    names = ("vicuna_v1", "v1", "llava_v1", "mistral_instruct", "chatml_direct")
    prompts = {name: evaluation_prompt(TEMPLATES[name], "Why?") for name in names}
    human_system = SYSTEM.replace("curious user", "curious human").replace("user's", "human's")
    assert prompts == {
        "vicuna_v1": f"{SYSTEM} USER: <image>\nWhy? ASSISTANT:",
        "v1": f"{SYSTEM} USER: <image>\nWhy? ASSISTANT:",
        "llava_v1": f"{human_system} USER: <image>\nWhy? ASSISTANT:",
        "mistral_instruct": "[INST] <image>\nWhy? [/INST]",
        "chatml_direct": (
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhy?"
            "<|im_end|><|im_start|>assistant\n"
        ),
    }
    assert evaluation_prompt(VICUNA, "Why?", has_image=False) == f"{SYSTEM} USER: Why? ASSISTANT:"


def test_training_prompts():
    turns = ["<image>\nWhat?", "A cat.", "Big?", "No."]
    assert training_prompt(VICUNA, turns) == (
        f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Big? ASSISTANT: No.</s>"
    )
    assert training_prompt(VICUNA, ["What?", ""]) == f"{SYSTEM} USER: What? ASSISTANT:"
    assert training_prompt(PLAIN, ["<image>\nDescribe.", "A cat."]) == "<image>A cat.\n"


def test_templates_refuse_what_they_have_no_form_for():
    with pytest.raises(ValueError, match="'plain' is for pre-training only"):
        evaluation_prompt(PLAIN, "Why?")
    with pytest.raises(ValueError, match="'chatml_direct' is for evaluation only"):
        training_prompt(TEMPLATES["chatml_direct"], ["Why?", "So."])
    with pytest.raises(ValueError, match="4 turns"):
        training_prompt(PLAIN, ["<image>", "a", "b", "c"])


@pytest.mark.parametrize("has_image", [True, False])
def test_literal_image_in_a_question_is_refused(has_image):
    with pytest.raises(ValueError, match="literal '<image>' at character 8"):
        evaluation_prompt(VICUNA, "What is <image>?", has_image)


# ---- turns ----


def test_image_comes_first_in_its_turn():
    sample = conversation("What?\n<image>", "A cat.", " Big? ", "No.")
    assert sample_turns(sample) == ["<image>\nWhat?", "A cat.", " Big? ", "No."]
    assert sample_turns(conversation("<image> <image>", "x")) == ["<image>", "x"]
    # Without an image the marker is text like any other.
    assert sample_turns(conversation("a <image>", "x", image=False)) == ["a <image>", "x"]


def test_leading_assistant_turn_is_dropped():
    sample = conversation("Q", "A", image=False)
    sample["conversations"].insert(0, {"from": "gpt", "value": "Hello"})
    assert sample_turns(sample) == ["Q", "A"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"conversations": []}, "no human turn"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "no human turn"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 1 is from 'human'"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "turn 0 is from 'gpt'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0 is None"),
        ({"conversations": [{"from": "human"}]}, "'value'"),
        ({"conversations": None}, "NoneType"),
        ({"image": "1.jpg"}, "<image> appears in 0 turns"),
    ],
    ids=str,
)
def test_broken_samples_are_refused_by_id(change, cause):
    sample = conversation("Q", "A", image=False, id="coco/17") | change
    with pytest.raises(SampleError, match=f"sample 'coco/17': .*{cause}"):
        sample_turns(sample)


def test_image_in_two_turns_is_refused():
    with pytest.raises(SampleError, match="<image> appears in 2 turns"):
        sample_turns(conversation("<image> Q", "A", "<image>", "B"))


# ---- labels ----


@settings(max_examples=60)
@given(question=words, answer=words, image=st.booleans())
def test_answer_and_end_are_supervised(small_model, question, answer, image):
    sample = conversation(("<image>\n" if image else "") + question, answer, image=image)
    for style, protocol in PUBLISHED_PAIRS:
        tokenizer = SentencePieceTokenizer(small_model, style)
        ids, labels, mismatch = label_mask(tokenizer, sample, VICUNA, protocol)
        assert not mismatch
        supervised = labels[labels != IGNORE]
        assert tokenizer.decode(supervised) == answer
        assert supervised[-1] == tokenizer.eos_id
        # One run at the very end, and nothing but the ids themselves.
        np.testing.assert_array_equal(ids[-len(supervised) :], supervised)
        assert np.count_nonzero(ids == IMAGE_TOKEN) == image


@functools.cache
def published_tokenizer(golden, style) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(golden / "tokenizer/tokenizer.model", style)


@settings(max_examples=60)
@given(rounds=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_every_answer_of_a_long_conversation_is_supervised(golden, rounds):
    turns = [text for pair in rounds for text in pair]
    turns[0] = f"<image>\n{turns[0]}"
    for style, protocol in PUBLISHED_PAIRS:
        tokenizer = published_tokenizer(golden, style)
        _, labels, mismatch = label_mask(tokenizer, conversation(*turns), VICUNA, protocol)
        assert not mismatch
        expected = [
            token for _, answer in rounds for token in [*tokenizer.encode(answer), tokenizer.eos_id]
        ]
        assert labels[labels != IGNORE].tolist() == expected


def test_caption_and_newline_are_supervised(small_model):
    tokenizer = SentencePieceTokenizer(small_model)
    ids, labels, mismatch = label_mask(tokenizer, conversation("Go\n<image>", "A cat."), PLAIN)
    assert ids.tolist() == [tokenizer.bos_id, IMAGE_TOKEN, *tokenizer.encode("A cat.\n")]
    assert labels.tolist() == [IGNORE] * 2 + tokenizer.encode("A cat.\n")
    assert ids.dtype == labels.dtype == np.int32
    assert not mismatch


@pytest.mark.parametrize(
    "turns",
    [
        ["<image>Q", "A ASSISTANT: B"],
        ["<image>Q", ""],
        ["<image>Q <unk>", "A"],
        ["<image>Q", "A", "Q without an answer"],
    ],
    ids=str,
)
def test_mismatch_leaves_no_label_and_is_reported(small_model, turns):
    tokenizer = SentencePieceTokenizer(small_model, "4.37")
    ids, labels, mismatch = label_mask(tokenizer, conversation(*turns), VICUNA, "llava-1.2")
    assert mismatch
    assert np.all(labels == IGNORE)
    assert len(labels) == len(ids)


def test_an_image_position_is_never_a_label(small_model):
    tokenizer = SentencePieceTokenizer(small_model, "4.37")
    labelled = label_mask(tokenizer, conversation("Draw a cat.", "<image>\nHere."), VICUNA)
    assert IMAGE_TOKEN in labelled.ids
    assert IMAGE_TOKEN not in labelled.labels
    assert not labelled.mismatch
    assert labelled.labels[-1] == tokenizer.eos_id


def test_a_sample_beyond_the_limit_is_not_checked(small_model):
    """The reference compares lengths only where nothing will be cut off."""
    tokenizer = SentencePieceTokenizer(small_model, "4.37")
    sample = conversation("<image>Q", "A", "Q2")
    assert label_mask(tokenizer, sample, VICUNA, max_length=2048).mismatch
    labelled = label_mask(tokenizer, sample, VICUNA, max_length=10)
    assert not labelled.mismatch
    supervised = labelled.labels[labelled.labels != IGNORE]
    assert supervised.tolist() == [*tokenizer.encode("A"), tokenizer.eos_id]


def test_label_mask_refuses_what_it_cannot_do(small_model):
    tokenizer = SentencePieceTokenizer(small_model)
    sample = conversation("<image>Q", "A")
    with pytest.raises(ValueError, match="unknown protocol 'llava-2'"):
        label_mask(tokenizer, sample, VICUNA, "llava-2")
    with pytest.raises(ValueError, match="for evaluation only"):
        label_mask(tokenizer, sample, TEMPLATES["chatml_direct"])
    with pytest.raises(SampleError, match="sample 's1': 4 turns"):
        label_mask(tokenizer, conversation("<image>", "a", "b", "c"), PLAIN)
    with pytest.raises(SampleError, match="image: False"):
        label_mask(tokenizer, conversation("Q", "A", image=False), PLAIN)


# ---- the reference's labels and prompts ----


class TransformersTokenizer(SentencePieceTokenizer):
    """Ids from transformers 5, whose double spaces and leading spaces differ."""

    def __init__(self, path: pathlib.Path, theirs) -> None:
        super().__init__(path, "4.37")
        self._theirs = theirs

    def _encode_segments(self, segments: Sequence[str]) -> list[int]:
        return self._theirs("".join(segments), add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def golden_tokenizers(golden, tmp_path_factory) -> dict[str, SentencePieceTokenizer]:
    """One per environment of the golden label masks."""
    transformers = pytest.importorskip("transformers", "5.0")
    path = golden / "tokenizer/tokenizer.model"
    folder = tmp_path_factory.mktemp("transformers")
    shutil.copy(path, folder)
    theirs = transformers.LlamaTokenizer.from_pretrained(folder, legacy=False)
    return {
        "4.31.0": SentencePieceTokenizer(path, "4.31"),
        "4.37.2": SentencePieceTokenizer(path, "4.37"),
        "5.23.0": TransformersTokenizer(path, theirs),
    }


def test_golden_label_masks(golden, golden_tokenizers):
    cases = json.loads((golden / "tokenizer/label_masks.json").read_text())["cases"]
    assert len(cases) == 36
    for case in cases:
        protocol = "llava-1.2" if case["later_round_length_fix"] else "prumerge"
        tokenizer = golden_tokenizers[case["transformers"]]
        ids, labels, mismatch = label_rounds(
            tokenizer, VICUNA, case["text"], case["has_image"], protocol
        )
        name = (case["name"], case["transformers"], protocol)
        assert ids.tolist() == case["input_ids"], name
        assert labels.tolist() == case["labels"], name
        assert mismatch == case["mismatch"], name


@pytest.mark.parametrize(
    ("style", "protocol", "length", "supervised"),
    [
        ("4.31", "prumerge", 65, [47, 48, 49, 50, 62, 63, 64]),
        ("4.37", "llava-1.2", 64, [47, 48, 49, 50, 61, 62, 63]),
    ],
)
def test_two_rounds_with_an_image(golden, style, protocol, length, supervised):
    tokenizer = SentencePieceTokenizer(golden / "tokenizer/tokenizer.model", style)
    sample = conversation("What is this?\n<image>", "A cat.", "What color?", "Black.")
    ids, labels, mismatch = label_mask(tokenizer, sample, VICUNA, protocol)
    assert len(ids) == length
    assert np.flatnonzero(labels != IGNORE).tolist() == supervised
    assert tokenizer.decode(labels[supervised]) == "A cat. Black."
    assert not mismatch


def science_prompts(path: pathlib.Path) -> list[str]:
    suffix = "\nAnswer with the option's letter from the given choices directly."
    prompts = []
    for row in json.loads(gzip.decompress(path.read_bytes())):
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        prompts.append(evaluation_prompt(VICUNA, text + suffix, has_image="image" in row))
    return prompts


def line_prompts(path: pathlib.Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [evaluation_prompt(VICUNA, row["text"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "file", "read"),
    [
        ("pope", "pope/llava_pope_test.jsonl", line_prompts),
        ("vizwiz_first2000", "vizwiz/llava_test.first2000.jsonl", line_prompts),
        ("textvqa_first1000", "textvqa/llava_textvqa_val_v051_ocr.first1000.jsonl", line_prompts),
        ("gqa_first1000", "gqa/llava_gqa_testdev_balanced.first1000.jsonl", line_prompts),
        ("mme", "mme/llava_mme.jsonl", line_prompts),
        ("mm_vet", "mm_vet/llava-mm-vet.jsonl", line_prompts),
        ("llava_bench", "llava_bench/questions_rebuilt.jsonl", line_prompts),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json.gz", science_prompts),
    ],
)
def test_prompt_ids_of_a_benchmark(golden, name, file, read):
    if not (golden / file).is_file():
        pytest.skip(f"the golden data has no {file}")
    expected = json.loads((golden / "tokenizer/prompt_checksums.json").read_text())["sets"][name]
    tokenizer = SentencePieceTokenizer(golden / "tokenizer/tokenizer.model")
    rows = [tokenizer.encode_prompt(prompt) for prompt in read(golden / file)]
    assert len(rows) == expected["rows"]
    assert sum(map(len, rows)) == expected["ids_total"]
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(struct.pack("<I", len(ids)) + np.array(ids, "<i4").tobytes())
    assert digest.hexdigest() == expected["sha256"]

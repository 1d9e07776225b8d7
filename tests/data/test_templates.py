"""Templates of every family: prompts, several turns, labels, and text that is no control token."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data.bpe_tokenizer import BpeTokenizer
from prumerge_jax.data.conversation import label_mask
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import (
    TEMPLATES,
    evaluation_parts,
    joined,
    prompt_parts,
)
from prumerge_jax.data.tokenizer import TextStream, Tokenizer, load_tokenizer, tokenizer_file
from prumerge_jax.data.tokens import IGNORE, IMAGE_PLACEHOLDER, IMAGE_TOKEN, VIDEO_PLACEHOLDER

CONTROLS = {
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<image>"),
    ),
}
TEMPLATE_OF = {
    "qwen_1_5": "qwen2",
    "chatml_direct": "qwen2",
    "llava_llama_3": "llama3",
    "llava_llama_3_double_header": "llama3",
}
ASKING = sorted(name for name, template in TEMPLATES.items() if template.human is not None)
words = st.lists(st.sampled_from(["a", "cat", "12", "What?", "\n", "yes,", "é"]), min_size=1).map(
    " ".join
)


def write_bpe(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """A small byte-level BPE file of the form that Qwen2 or Llama-3 ships."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["What is this? \n\n user assistant system cat yes"] * 3, trainer)
    bpe.add_special_tokens([*CONTROLS[kind]])
    if kind == "llama3":
        start = "<|begin_of_text|>"
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
        )
    path = folder / kind / "tokenizer.json"
    path.parent.mkdir()
    bpe.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BpeTokenizer]:
    folder = tmp_path_factory.mktemp("bpe")
    return {kind: BpeTokenizer(write_bpe(folder, kind)) for kind in CONTROLS}


def of_template(name: str, bpe: dict[str, BpeTokenizer], model: pathlib.Path) -> Tokenizer:
    return bpe[TEMPLATE_OF[name]] if name in TEMPLATE_OF else SentencePieceTokenizer(model)


# ---- tokenizers ----


@pytest.mark.parametrize("name", CONTROLS)
def test_golden_bpe_ids(golden: pathlib.Path, name: str) -> None:
    folder = golden / "models/tokenizers"
    expected = json.loads((folder / "tokenizer_cases.json").read_text())[name]
    tokenizer = load_tokenizer(tokenizer_file(folder / name))
    assert isinstance(tokenizer, BpeTokenizer)
    assert tokenizer.vocab_size == expected["vocab_size"]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for case in expected["cases"]:
        ids = tokenizer.encode_markup(case["text"])
        assert ids == case["ids"], case["text"]
        assert [*start, *ids] == case["ids_with_bos"], case["text"]
        assert tokenizer.decode(ids) == case["decoded"].strip()
        if not any(control in case["text"] for control in expected["specials"]):
            assert tokenizer.encode(case["text"]) == case["ids"]


def test_the_loader_goes_by_the_file(tmp_path: pathlib.Path, small_model: pathlib.Path) -> None:
    path = write_bpe(tmp_path, "qwen2")
    assert isinstance(load_tokenizer(tokenizer_file(path.parent)), BpeTokenizer)
    (path.parent / "tokenizer.model").write_bytes(small_model.read_bytes())
    assert isinstance(load_tokenizer(tokenizer_file(path.parent)), SentencePieceTokenizer)
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such file"):
        load_tokenizer(tokenizer_file(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "BPE"}}', "not a tokenizer.json"),
        ("\x00", "not a tokenizer.json"),
    ],
)
def test_other_files_are_refused(tmp_path: pathlib.Path, content: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*expected the byte-level BPE") as error:
        BpeTokenizer(path)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_json_is_refused(tmp_path: pathlib.Path) -> None:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="BPE model without byte level.*needs its tokenizer.model"):
        BpeTokenizer(tmp_path / "tokenizer.json")


@settings(max_examples=100)
@given(text=st.text(max_size=30))
def test_bpe_text_survives_the_round_trip(bpe: dict[str, BpeTokenizer], text: str) -> None:
    for kind, tokenizer in bpe.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.strip()
        assert not set(ids) & {tokenizer.encode_markup(c)[0] for c in CONTROLS[kind]}
        stream = TextStream(tokenizer)
        pieces = [stream.push([token]) for token in ids] + [stream.finish()]
        assert "".join(pieces) == text.strip()


def test_decode_leaves_out_what_has_no_text(bpe: dict[str, BpeTokenizer]) -> None:
    tokenizer = bpe["qwen2"]
    ids = [*tokenizer.encode(" cat"), tokenizer.vocab_size, *tokenizer.encode_markup("<|im_end|>")]
    assert tokenizer.decode(ids) == "cat"
    with pytest.raises(ValueError, match="cannot decode id -200"):
        tokenizer.decode([IMAGE_TOKEN])
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")


# ---- prompts ----


def test_prompts_of_the_families() -> None:
    def prompt(name: str) -> str:
        return joined(evaluation_parts(TEMPLATES[name], "Why?"))

    assert prompt("mistral_instruct") == "[INST] <image>\nWhy? [/INST]"
    assert prompt("video_llava_hf") == "USER: <image>\nWhy? ASSISTANT:"
    assert prompt("qwen_1_5") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    user = "user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|>"
    start, answer = "<|start_header_id|>", "assistant<|end_header_id|>\n\n"
    once = prompt("llava_llama_3")
    assert once.startswith(f"{start}system<|end_header_id|>\n\nYou are a helpful language and ")
    assert once.endswith(f"natural language.<|eot_id|>{start}{user}{start}{answer}")
    twice = prompt("llava_llama_3_double_header")
    assert twice == once.replace(f"{start}user", f"{start}{start}user")


def test_several_turns_and_several_images() -> None:
    turns = ["<image>\nA?", "b", "C?", ""]
    for name, expected in {
        "mistral_instruct": "[INST] <image>\nA? [/INST] b </s>[INST] C? [/INST]",
        "qwen_1_5": (
            "<|im_start|>user\n<image>\nA?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
        ),
        "vicuna_v1": "USER: <image>\nA? ASSISTANT: b</s>USER: C? ASSISTANT:",
    }.items():
        parts = prompt_parts(TEMPLATES[name], turns, [IMAGE_PLACEHOLDER])
        assert joined(parts).endswith(expected)
        assert [part.text for part in parts if part.kind == "visual"] == [IMAGE_PLACEHOLDER]
    visuals = [IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER]
    parts = evaluation_parts(TEMPLATES["qwen_1_5"], "Why?", visuals)
    assert "user\n<image>\n<video>\nWhy?<|im_end|>" in joined(parts)
    assert sum(part.kind == "visual" for part in parts) == 2


@pytest.mark.parametrize("name", ASKING)
def test_parts_and_markup_give_the_same_ids(
    bpe: dict[str, BpeTokenizer], small_model: pathlib.Path, name: str
) -> None:
    template, tokenizer = TEMPLATES[name], of_template(name, bpe, small_model)
    turns = ["<image>\nA  cat?", "yes \n", "12", ""]
    parts = prompt_parts(template, turns, [IMAGE_PLACEHOLDER])
    ids = tokenizer.encode_prompt(parts)
    assert ids == tokenizer.encode_prompt(joined(parts))
    assert ids.count(IMAGE_TOKEN) == 1


@pytest.mark.parametrize("name", ASKING)
def test_user_text_never_becomes_a_control_token(
    bpe: dict[str, BpeTokenizer], small_model: pathlib.Path, name: str
) -> None:
    template, tokenizer = TEMPLATES[name], of_template(name, bpe, small_model)
    controls = [*CONTROLS[TEMPLATE_OF.get(name, "qwen2")], "<s>", "</s>", "<unk>", "<video>"]
    control_ids = {
        token
        for control in controls
        for token in tokenizer.encode_markup(control)
        if tokenizer.encode(control) != tokenizer.encode_markup(control)
    }
    harmless = tokenizer.encode_prompt(evaluation_parts(template, "a"))
    for control in controls:
        if control == IMAGE_PLACEHOLDER:
            with pytest.raises(ValueError, match="literal '<image>' at character 2"):
                evaluation_parts(template, f"a {control}")
            continue
        ids = tokenizer.encode_prompt(evaluation_parts(template, f"a {control} b"))
        assert [i for i in ids if i in control_ids] == [i for i in harmless if i in control_ids]
        assert control in tokenizer.decode([i for i in ids if i >= 0])
    with pytest.raises(ValueError, match="literal '<video>' at character 0"):
        evaluation_parts(template, "<video>", [VIDEO_PLACEHOLDER])


def test_a_template_of_another_model_is_refused(
    bpe: dict[str, BpeTokenizer], small_model: pathlib.Path
) -> None:
    parts = evaluation_parts(TEMPLATES["qwen_1_5"], "a")
    for tokenizer in (bpe["llama3"], SentencePieceTokenizer(small_model)):
        with pytest.raises(ValueError, match="no control token '<|im_start|>'"):
            tokenizer.encode_prompt(parts)


# ---- labels ----


def sample(*turns: str) -> dict[str, object]:
    roles = ("human", "gpt")
    entries = [{"from": roles[n % 2], "value": turn} for n, turn in enumerate(turns)]
    return {"id": "s1", "image": "1.jpg", "conversations": entries}


def learnt_text(tokenizer: BpeTokenizer, labels: np.ndarray) -> list[str]:
    """What each run of supervised tokens says."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer._markup.decode(run, skip_special_tokens=False) for run in runs if run]


def test_labels_of_qwen(bpe: dict[str, BpeTokenizer]) -> None:
    """The assistant's turns, and every newline, beginning and end of a turn."""
    labelled = label_mask(
        bpe["qwen2"], sample("<image>\nWhat?", "cat <|im_end|>", "this?", "yes"),
        TEMPLATES["qwen_1_5"],
    )  # fmt: skip
    assert not labelled.mismatch
    assert learnt_text(bpe["qwen2"], labelled.labels) == [
        "<|im_start|>",  # system
        "\n",
        "<|im_end|>\n<|im_start|>",  # user
        "\n",
        "\n",  # after the image
        "<|im_end|>\n<|im_start|>assistant\ncat <|im_end|><|im_end|>\n<|im_start|>",  # user
        "\n",
        "<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
    ]


def test_labels_of_llama_3(bpe: dict[str, BpeTokenizer]) -> None:
    labelled = label_mask(
        bpe["llama3"], sample("<image>\nWhat?", "cat"), TEMPLATES["llava_llama_3"]
    )
    start, end = "<|start_header_id|>", "<|end_header_id|>"
    assert learnt_text(bpe["llama3"], labelled.labels) == [
        start,  # system
        f"{end}\n\n",
        f"<|eot_id|>{start}",  # user
        f"{end}\n\n",
        f"<|eot_id|>{start}assistant{end}\n\ncat<|eot_id|>",
    ]


@settings(max_examples=40)
@given(rounds=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_ids_of_labelled_samples_are_those_of_the_prompt(
    bpe: dict[str, BpeTokenizer], rounds: list[tuple[str, str]]
) -> None:
    turns = [text for pair in rounds for text in pair]
    turns[0] = f"<image>\n{turns[0]}".strip()
    for name in ("qwen_1_5", "llava_llama_3", "llava_llama_3_double_header"):
        tokenizer, template = bpe[TEMPLATE_OF[name]], TEMPLATES[name]
        labelled = label_mask(tokenizer, sample(*turns), template)
        whole = prompt_parts(template, turns, [IMAGE_PLACEHOLDER])
        assert labelled.ids.tolist() == tokenizer.encode_prompt(whole)
        assert np.all((labelled.labels == IGNORE) | (labelled.labels == labelled.ids))


@settings(max_examples=40)
@given(rounds=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_labels_of_mistral(small_model: pathlib.Path, rounds: list[tuple[str, str]]) -> None:
    """The answers and the end of each, in both styles."""
    rounds = [(q.strip() or "q", a.strip() or "a") for q, a in rounds]
    turns = [text for pair in rounds for text in pair]
    turns[0] = f"<image>\n{turns[0]}"
    for style in ("4.31", "4.37"):
        tokenizer = SentencePieceTokenizer(small_model, style)
        labelled = label_mask(tokenizer, sample(*turns), TEMPLATES["mistral_instruct"])
        assert not labelled.mismatch
        learnt = labelled.labels[labelled.labels != IGNORE].tolist()
        ends = [n for n, token in enumerate(learnt) if token == tokenizer.eos_id]
        starts = [0, *(end + 1 for end in ends)]
        answers = [tokenizer.decode(learnt[a:b]) for a, b in zip(starts, ends, strict=False)]
        assert answers == [answer for _, answer in rounds]
        assert ends[-1] == len(learnt) - 1


def test_labels_that_need_one_token_are_refused(bpe: dict[str, BpeTokenizer]) -> None:
    template = dataclasses.replace(TEMPLATES["qwen_1_5"], always_learnt=("two tokens",))
    with pytest.raises(ValueError, match="learns 'two tokens' as one token"):
        label_mask(bpe["qwen2"], sample("<image>\na", "b"), template)

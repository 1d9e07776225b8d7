import json
import os
import pathlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.tokenizer import TextStream
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN
from tests.data.conftest import train_model

STYLES = ("4.31", "4.37")
SPECIALS = ("<s>", "</s>", "<unk>")

ordinary_text = st.text(max_size=30).filter(lambda text: not any(s in text for s in SPECIALS))


@pytest.fixture(scope="module")
def llama(golden: pathlib.Path) -> dict[str, SentencePieceTokenizer]:
    return {
        style: SentencePieceTokenizer(golden / "tokenizer/tokenizer.model", style)
        for style in STYLES
    }


@pytest.fixture(scope="module")
def small(small_model: pathlib.Path) -> dict[str, SentencePieceTokenizer]:
    return {style: SentencePieceTokenizer(small_model, style) for style in STYLES}


# ---- the reference's ids ----


@pytest.mark.parametrize("style", STYLES)
def test_golden_ids(golden, llama, style):
    cases = json.loads((golden / "tokenizer/golden_ids.json").read_text())
    assert len(cases) == 14
    for case in cases:
        assert llama[style].encode_prompt(case["text"]) == case["ids"], case["name"]


@pytest.mark.parametrize(
    ("text", "ids_4_31", "ids_4_37"),
    [
        # As transformers 4.31.0 and 4.37.2 (slow, legacy false) give them.
        ("</s>USER:", [2, 3308, 1001, 29901], [2, 11889, 29901]),
        ("ASSISTANT: </s>", [319, 1799, 9047, 13566, 29901, 2],
         [319, 1799, 9047, 13566, 29901, 29871, 2]),
        ("What <unk> is?", [1724, 0, 275, 29973], [1724, 29871, 0, 338, 29973]),
        ("a </s> b", [263, 2, 29890], [263, 29871, 2, 289]),
        ("\t\t</s>", [2], [29871, 12, 12, 2]),
        ("a</s>\u2581b", [263, 2, 29890], [263, 2, 289]),
        ("<s>a</s></s>b ", [1, 29874, 2, 2, 29890, 29871], [1, 29874, 2, 2, 29890, 29871]),
    ],
)  # fmt: skip
def test_literal_specials(llama, text, ids_4_31, ids_4_37):
    assert llama["4.31"].encode_markup(text) == ids_4_31
    assert llama["4.37"].encode_markup(text) == ids_4_37


def encode_prompt_hf(tokenizer, prompt, image_tokens=1):
    """Ids as Hugging Face's LlavaProcessor has them (transformers >= 4.37).

    There `<image>` is a special token, so the text after it has no word-start piece. LLaVA was
    neither trained nor published with these ids: this documents the difference.
    """
    first, *rest = prompt.split(IMAGE_PLACEHOLDER)
    ids = [tokenizer.bos_id, *tokenizer.encode_markup(first)]
    for chunk in rest:
        ids += [IMAGE_TOKEN] * image_tokens
        ids += tokenizer.encode_markup("\n" + chunk)[
            2:
        ]  # the word-start mark and the newline's byte
    return ids


def test_hugging_face_route_of_a_full_image(llama):
    ids = encode_prompt_hf(llama["4.37"], "USER: <image>\nWhat", image_tokens=576)
    assert ids == [1, 3148, 1001, 29901, 29871, *[IMAGE_TOKEN] * 576, 13, 5618]


@pytest.mark.parametrize("image_tokens", [1, 3])
@pytest.mark.parametrize(
    "text",
    [
        "USER: <image>\nWhat is this? ASSISTANT:",
        "USER: What is this?\n<image> ASSISTANT: A cat.</s>USER: And? ASSISTANT:",
        "<image>two<image><image>images, é中😀",
        "no image",
        "",
    ],
)
def test_hugging_face_route_equals_transformers(golden, llama, tmp_path, text, image_tokens):
    transformers = pytest.importorskip("transformers")
    shutil.copy(golden / "tokenizer/tokenizer.model", tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    theirs.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    image_id = theirs.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    expanded = text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER * image_tokens)
    expected = [1, *theirs(expanded, add_special_tokens=False).input_ids]

    ids = encode_prompt_hf(llama["4.37"], text, image_tokens)

    assert [image_id if token == IMAGE_TOKEN else token for token in ids] == expected


def test_llama_special_ids(llama):
    tokenizer = llama["4.31"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert (tokenizer.unk_id, tokenizer.pad_id) == (0, 0)
    assert tokenizer.vocab_size == 32000


# ---- properties, on a model trained here ----


@settings(max_examples=200)
@given(text=ordinary_text)
def test_text_survives_the_round_trip(small, text):
    for tokenizer in small.values():
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ").strip()


@settings(max_examples=200)
@given(first=ordinary_text, special=st.sampled_from(SPECIALS), second=ordinary_text)
def test_a_special_splits_the_text(small, first, special, second):
    tokenizer = small["4.37"]
    special_id = {
        "<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id, "<unk>": tokenizer.unk_id,
    }[special]  # fmt: skip
    head = [*tokenizer.encode(first), special_id]
    ids = tokenizer.encode_markup(first + special + second)
    assert ids[: len(head)] == head
    # Without a word-start mark the second text comes back as it is, not shortened by one space.
    tail = tokenizer.decode([*tokenizer.encode("."), *ids[len(head) :]])
    assert tail == "." + second.replace("\u2581", " ").rstrip()


@settings(max_examples=100)
@given(chunks=st.lists(ordinary_text, min_size=1, max_size=4), style=st.sampled_from(STYLES))
def test_prompt_chunks_are_encoded_apart(small, chunks, style):
    tokenizer = small[style]
    expected = [tokenizer.bos_id]
    for number, chunk in enumerate(chunks):
        expected += ([IMAGE_TOKEN] if number else []) + tokenizer.encode(chunk)
    assert tokenizer.encode_prompt(IMAGE_PLACEHOLDER.join(chunks)) == expected


def test_decode_leaves_out_what_has_no_text(small):
    tokenizer = small["4.31"]
    ids = tokenizer.encode(" a cat\n")
    framed = [tokenizer.bos_id, *ids, tokenizer.unk_id, tokenizer.eos_id, tokenizer.vocab_size]
    assert tokenizer.decode(framed) == "a cat"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="-200"):
        tokenizer.decode([*ids, IMAGE_TOKEN])


def test_lone_surrogate_is_refused(small):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        small["4.31"].encode("a\ud800b")


# ---- wrong files ----


def test_wrong_files_are_refused_by_name(tmp_path, small_model):
    cases = {
        "empty.model": (b"", "is empty"),
        "page.model": (b"<html>404</html>", "not a SentencePiece model"),
        "half.model": (small_model.read_bytes()[:3000], "not a SentencePiece model"),
    }
    for name, (content, cause) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*{cause}"):
            SentencePieceTokenizer(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing\.model: no such file"):
        SentencePieceTokenizer(tmp_path / "missing.model")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SentencePieceTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "a newline is encoded as"),
        ({"byte_fallback": False}, "a newline is encoded as"),
        ({"add_dummy_prefix": False}, "a newline is encoded as"),
        ({"bos_id": -1}, "lacks a <s>"),
    ],
    ids=str,
)
def test_models_of_another_kind_are_refused(tmp_path, options, cause):
    path = train_model(tmp_path / "other", **options)
    with pytest.raises(ValueError, match=f"other.model: .*{cause}"):
        SentencePieceTokenizer(path)


def test_unknown_style_is_refused(small_model):
    with pytest.raises(ValueError, match="unknown style '5.0'"):
        SentencePieceTokenizer(small_model, "5.0")


@settings(max_examples=300)
@given(data=st.data())
def test_pieces_of_a_stream_join_to_the_whole_text(small, data):
    """Any ids at all, in chunks of any size: white space, halves of characters, specials."""
    tokenizer = small["4.31"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    text = data.draw(ordinary_text)
    ids = data.draw(st.sampled_from([ids, tokenizer.encode(text), tokenizer.encode(text) + ids]))
    stream = TextStream(tokenizer)
    pieces = []
    while ids[sum(len(chunk) for chunk, _ in pieces) :]:
        begin = sum(len(chunk) for chunk, _ in pieces)
        chunk = ids[begin : begin + data.draw(st.integers(1, 4))]
        pieces.append((chunk, stream.push(chunk)))
        written = "".join(piece for _, piece in pieces)
        assert tokenizer.decode(ids[: begin + len(chunk)]).startswith(written)
    assert "".join(piece for _, piece in pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_writes_words_as_they_come(small):
    tokenizer = small["4.31"]
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode("Yes, a cat 猫.")]
    assert sum(bool(piece) for piece in pieces) > 3
    assert "".join(pieces) == "Yes, a cat 猫."
    assert stream.finish() == ""


def test_only_a_regular_file_is_a_model(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")

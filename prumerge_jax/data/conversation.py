"""The training samples of LLaVA's data files: their turns, token ids and labels.

The label rules are those of LLaVA's `train.py`, of LLaVA-NeXT's, and of the PruMerge repository,
which is a fork of LLaVA 1.1.3; `LabelProtocol` names where that differs.
A sample is one entry of LLaVA's data file: `{"id", "image", "images" or "video" (optional),
"conversations": [{"from": "human" or "gpt", "value"}, ...]}`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from prumerge_jax.data.templates import Template, prompt_parts, training_prompt, turn_parts
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN,
    VIDEO_PLACEHOLDER,
)

LabelProtocol = Literal["prumerge", "llava-1.2"]
"""Whose label lengths to use for the rounds after the first.

`llava-1.2` takes one off both lengths where `</s>USER` has one id less than ` USER`, as in the
tokenizer style `4.37`; `prumerge` never does, and therefore loses every multi-round sample in
that style. The published pairs are `prumerge` with `4.31` and `llava-1.2` with `4.37`.
"""

_ROLES = ("human", "gpt")


class SampleError(ValueError):
    """A training sample breaks LLaVA's format; the message names its id."""


def has_image(sample: Mapping[str, Any]) -> bool:
    """Whether an entry shows an image or a video."""
    return any(name in sample for name in ("image", "images", "video"))


def sample_turns(sample: Mapping[str, Any]) -> list[str]:
    """The turns of a sample, human first, with `<image>\\n` moved to the front of its turn.

    A first turn that is not the human's is dropped. Several `<image>` in one turn become one.

    Raises:
      SampleError: the turns do not alternate, a role or the conversation is missing, or a sample
        with an image or a video does not mention it in exactly one turn, or several images not
        once each.
    """
    name = f"sample {sample.get('id', '(no id)')!r}"
    try:
        turns = [(turn["from"], turn["value"]) for turn in sample["conversations"]]
    except (KeyError, TypeError) as error:
        raise SampleError(
            f'{name}: no "conversations" list of {{"from", "value"}} entries ({error!r})'
        ) from error
    if turns and turns[0][0] != _ROLES[0]:
        turns = turns[1:]
    if not turns:
        raise SampleError(f"{name}: no human turn; expected human and gpt turns in alternation")
    for number, (role, text) in enumerate(turns):
        if role != _ROLES[number % 2]:
            raise SampleError(
                f"{name}: turn {number} is from {role!r}; expected {_ROLES[number % 2]!r}, human "
                "and gpt in alternation"
            )
        if not isinstance(text, str):
            raise SampleError(f"{name}: turn {number} is {text!r}; expected a string")
    texts = [text for _, text in turns]
    if not has_image(sample):
        return texts
    if "images" in sample:
        return _check_several(texts, len(sample["images"]), name)
    if "video" in sample:
        texts = [text.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER) for text in texts]
    mentions = sum(IMAGE_PLACEHOLDER in text for text in texts)
    if mentions != 1:
        raise SampleError(
            f"{name}: {IMAGE_PLACEHOLDER} appears in {mentions} turns; expected 1, as the sample "
            "has one image"
        )
    return [_image_first(text) for text in texts]


def _check_several(texts: list[str], images: int, name: str) -> list[str]:
    """The turns, which keep their placeholders where they are, one for each image."""
    mentions = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if mentions != images or any(IMAGE_PLACEHOLDER in answer for answer in texts[1::2]):
        raise SampleError(
            f"{name}: {IMAGE_PLACEHOLDER} appears {mentions} times; expected once for each of the "
            f"{images} images, in turns of human"
        )
    return texts


def _image_first(text: str) -> str:
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


class LabelledText(NamedTuple):
    """Token ids and labels of one sample, before images are inserted and before truncation.

    Attributes:
      ids: int32 [T], BOS first, `IMAGE_TOKEN` (-200) where an image goes.
      labels: int32 [T], the ids to be predicted, `IGNORE` (-100) elsewhere.
      mismatch: the rounds did not add up to the total and every label was dropped: count these.
    """

    ids: np.ndarray
    labels: np.ndarray
    mismatch: bool


def label_mask(
    tokenizer: Tokenizer,
    sample: Mapping[str, Any],
    template: Template,
    protocol: LabelProtocol = "prumerge",
    max_length: int = 2048,
) -> LabelledText:
    """Token ids and labels of a sample of LLaVA's data file.

    Supervised are the answers and the token that ends each; for `plain` the caption and its
    newline; for the templates of Qwen and Llama-3 what LLaVA-NeXT learns, see `label_turns`.
    Nothing is truncated here.

    Args:
      tokenizer: its style says how `</s>` inside the text is read.
      sample: see the module's documentation.
      template: one with a training form.
      protocol: whose label lengths.
      max_length: tokens that a sample is later cut to; a longer one is not checked for mismatch.

    Raises:
      SampleError: the sample breaks the format.
      ValueError: the template has no training form, or no such protocol.
    """
    turns = sample_turns(sample)
    if template.human is not None and template.labels == "rounds":
        text = training_prompt(template, turns)
        return label_rounds(tokenizer, template, text, has_image(sample), protocol, max_length)
    if template.human is not None:
        label = label_turns if template.labels == "turns" else label_answers
        return label(tokenizer, template, turns, has_image(sample))
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0]:
        raise SampleError(
            f"sample {sample.get('id', '(no id)')!r}: {len(turns)} turns, image: "
            f"{has_image(sample)}; template {template.name!r} expects an image and a caption"
        )
    return label_caption(tokenizer, training_prompt(template, turns))


def label_rounds(
    tokenizer: Tokenizer,
    template: Template,
    text: str,
    has_image: bool,
    protocol: LabelProtocol = "prumerge",
    max_length: int = 2048,
) -> LabelledText:
    """Labels of a conversation that is one string already (LLaVA's `preprocess_v1`).

    The reference finds each round by the *lengths* of its parts tokenised alone. Where those do
    not add up to the total (an answer that holds the text of a role, a literal `<unk>`), the sample
    is left without any label, and `mismatch` is set.

    Args:
      tokenizer: as in `label_mask`.
      template: the one that made `text`.
      text: the string `training_prompt` made.
      has_image: whether `<image>` in the text is an image or ordinary characters.
      protocol: as in `label_mask`.
      max_length: as in `label_mask`.

    Raises:
      ValueError: no such protocol, or the template has no training form.
    """
    if protocol not in get_args(LabelProtocol):
        raise ValueError(
            f"unknown protocol {protocol!r}; expected one of {get_args(LabelProtocol)}"
        )
    if template.assistant_end is None:
        raise ValueError(f"template {template.name!r} is for evaluation only and has no labels")
    encode = _encoder(tokenizer, has_image)
    ids = np.array(encode(text), np.int32)
    labels = ids.copy()
    labels[0] = IGNORE
    answer_mark = template.human_end + template.assistant + template.gap
    later_excess = int(protocol == "llava-1.2" and tokenizer.style == "4.37")
    start = 1
    for number, round_text in enumerate(text.split(template.assistant_end)):
        if round_text.count(answer_mark) != 1:
            break
        excess = later_excess if number else 0
        instruction = round_text[: round_text.index(answer_mark)] + answer_mark
        # Without BOS and without the word-start piece that the answer's first word will swallow.
        instruction_length = len(encode(instruction)) - 2 - excess
        labels[start : start + instruction_length] = IGNORE
        # BOS is counted in place of the </s> that ends the round.
        start += len(encode(round_text)) - excess
    labels[start:] = IGNORE
    labels[ids == IMAGE_TOKEN] = IGNORE
    mismatch = start < max_length and start != np.count_nonzero(ids != tokenizer.pad_id)
    if mismatch:
        labels[:] = IGNORE
    return LabelledText(ids, labels, mismatch)


def label_turns(
    tokenizer: Tokenizer, template: Template, turns: Sequence[str], has_image: bool
) -> LabelledText:
    """Labels of a conversation between control tokens (LLaVA-NeXT's `preprocess_qwen` and
    `preprocess_llama3`).

    Supervised are the assistant's turns, role and end included, and the template's
    `always_learnt` tokens wherever they stand, in the user's turns too. Turns begin or end with
    control tokens, across which nothing is merged: their ids add up.

    Args:
      tokenizer: one that has the template's control tokens.
      template: one whose `labels` is `turns`.
      turns: texts of the human and the assistant in turn.
      has_image: whether `<image>` in the turns is an image or ordinary characters.

    Raises:
      ValueError: the tokenizer lacks a control token of the template.
    """
    places = (IMAGE_PLACEHOLDER,) if has_image else ()
    start = len(tokenizer.encode_prompt([]))  # BOS, if there is one
    ids = tokenizer.encode_prompt(prompt_parts(template, []))
    learnt = len(ids) * [False]
    for number in range(len(turns)):
        turn = tokenizer.encode_prompt(turn_parts(template, turns, number, places))[start:]
        ids += turn
        learnt += len(turn) * [number % 2 == 1]
    always = [tokenizer.encode_markup(text) for text in template.always_learnt]
    if split := [template.always_learnt[n] for n, own in enumerate(always) if len(own) != 1]:
        raise ValueError(
            f"template {template.name!r} learns {split[0]!r} as one token, which the tokenizer "
            "does not have; expected the tokenizer of its model"
        )
    of_text = np.array(ids, np.int32)
    keep = np.array(learnt) | np.isin(of_text, [own[0] for own in always])
    labels = np.where(keep & (of_text != IMAGE_TOKEN), of_text, IGNORE).astype(np.int32)
    return LabelledText(of_text, labels, mismatch=False)


def label_answers(
    tokenizer: Tokenizer, template: Template, turns: Sequence[str], has_image: bool
) -> LabelledText:
    """Labels of a conversation without roles (LLaVA's `preprocess_llama_2`): the answers and the
    token that ends each.

    An answer begins where the ids of the conversation before it end. Where those are not the
    beginning of the whole's ids, the sample is left without any label, and `mismatch` is set.
    Arguments as in `label_turns`.
    """
    places = (IMAGE_PLACEHOLDER,) if has_image else ()
    ids = tokenizer.encode_prompt(prompt_parts(template, turns, places))
    labels = np.full(len(ids), IGNORE, np.int32)
    mismatch = len(turns) % 2 == 1
    for number in range(1, len(turns), 2):
        before = tokenizer.encode_prompt(prompt_parts(template, turns[:number], places))
        through = tokenizer.encode_prompt(prompt_parts(template, turns[: number + 1], places))
        mismatch |= ids[: len(before)] != before or ids[: len(through)] != through
        labels[len(before) : len(through)] = ids[len(before) : len(through)]
    of_text = np.array(ids, np.int32)
    labels[(of_text == IMAGE_TOKEN) | mismatch] = IGNORE
    return LabelledText(of_text, labels, mismatch)


def label_caption(tokenizer: Tokenizer, text: str) -> LabelledText:
    """Labels of a pre-training text `<image>caption\\n` (LLaVA's `preprocess_plain`).

    All but BOS and the image is supervised.
    """
    ids = np.array(tokenizer.encode_prompt(text), np.int32)
    labels = ids.copy()
    labels[: len(tokenizer.encode_prompt(IMAGE_PLACEHOLDER))] = IGNORE
    return LabelledText(ids, labels, mismatch=False)


def _encoder(tokenizer: Tokenizer, has_image: bool) -> Callable[[str], list[int]]:
    if has_image:
        return tokenizer.encode_prompt
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return lambda text: [*start, *tokenizer.encode_markup(text)]

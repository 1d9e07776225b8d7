"""LLaVA's conversation templates and the labels of its training samples.

The templates and the label rules are those of LLaVA's `conversation.py` and `train.py`, and of the
PruMerge repository, which is a fork of LLaVA 1.1.3; `LabelProtocol` names where the two differ.
A sample is one entry of LLaVA's data file: `{"id", "image" (optional), "conversations": [{"from":
"human" or "gpt", "value"}, ...]}`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IGNORE, IMAGE_PLACEHOLDER, IMAGE_TOKEN
from prumerge_jax.messages import quoted

LabelProtocol = Literal["prumerge", "llava-1.2"]
"""Whose label lengths to use for the rounds after the first.

`llava-1.2` takes one off both lengths where `</s>USER` has one id less than ` USER`, as in the
tokenizer style `4.37`; `prumerge` never does, and therefore loses every multi-round sample in
that style. The published pairs are `prumerge` with `4.31` and `llava-1.2` with `4.37`.
"""

_ROLES = ("human", "gpt")


class SampleError(ValueError):
    """A training sample breaks LLaVA's format; the message names its id."""


@dataclasses.dataclass(frozen=True)
class Template:
    """How the turns of a conversation become one string.

    A turn is its role, `gap`, its text and its end; a turn without text is its role alone.

    Attributes:
      name: the name LLaVA gives it.
      opening: what comes before the first turn, separator included.
      human: role of the human; None throws the human's text away and keeps the image alone.
      gap: between a role and its text.
      human_end: after the human's text.
      assistant: role of the assistant.
      assistant_end: after the assistant's text; None if the template is for evaluation only.
    """

    name: str
    opening: str
    human: str | None
    gap: str
    human_end: str
    assistant: str
    assistant_end: str | None


_VICUNA_V1 = Template(
    name="vicuna_v1",
    opening=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    human="USER:",
    gap=" ",
    human_end=" ",
    assistant="ASSISTANT:",
    assistant_end="</s>",
)
_LLAVA_V1 = dataclasses.replace(
    _VICUNA_V1,
    name="llava_v1",
    opening=_VICUNA_V1.opening.replace("curious user", "curious human").replace(
        "the user's", "the human's"
    ),
)
_PLAIN = Template(
    name="plain", opening="", human=None, gap="", human_end="", assistant="", assistant_end="\n"
)
_MISTRAL_INSTRUCT = Template(
    name="mistral_instruct",
    opening="",
    human="[INST]",
    gap=" ",
    human_end=" [/INST]",
    assistant="",
    assistant_end=None,
)
_CHATML_DIRECT = Template(
    name="chatml_direct",
    opening="<|im_start|>system\nAnswer the questions.<|im_end|>",
    human="<|im_start|>user\n",
    gap="",
    human_end="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    assistant_end=None,
)
TEMPLATES: Mapping[str, Template] = {
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _LLAVA_V1,
    "plain": _PLAIN,
    "mistral_instruct": _MISTRAL_INSTRUCT,
    "chatml_direct": _CHATML_DIRECT,
}


def chat_template(name: str) -> Template:
    """The template of this name.

    Raises:
      ValueError: there is none; the message lists the names.
    """
    if name not in TEMPLATES:
        raise ValueError(
            f"unknown conversation {quoted(name)}; expected one of {sorted(TEMPLATES)}"
        )
    return TEMPLATES[name]


def evaluation_prompt(template: Template, text: str, has_image: bool = True) -> str:
    """The prompt that asks `text`, ending where the answer begins; `<image>` comes first.

    Raises:
      ValueError: the text holds a literal `<image>`, or the template has no evaluation form.
    """
    if template.human is None:
        raise ValueError(
            f"template {template.name!r} is for pre-training only; expected one that asks a "
            "question, such as 'vicuna_v1'"
        )
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(
            f"the text holds a literal {IMAGE_PLACEHOLDER!r} at character "
            f"{text.index(IMAGE_PLACEHOLDER)}, which would be taken for an image; expected the "
            "user's words alone: the placeholder is added here"
        )
    if has_image:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    question = _turn(template.human, template.gap, text, template.human_end)
    return template.opening + question + template.assistant


def chat_prompt(
    template: Template, turns: Sequence[str], *, has_image: bool = False, system: str | None = None
) -> str:
    """The prompt that continues a conversation, ending where the assistant's next turn begins.

    With one turn it is that of `evaluation_prompt`.

    Args:
      template: one that asks questions.
      turns: texts of the human and the assistant in turn, the human's first and last.
      has_image: whether `<image>` comes before the first turn.
      system: what takes the place of the template's opening; None keeps it.

    Raises:
      ValueError: a turn holds a literal `<image>`, or the template has no evaluation form, takes
        one turn only, or has no opening in plain words.
    """
    first, *later = turns
    prompt = evaluation_prompt(template, first, has_image)
    if later and template.assistant_end is None:
        raise ValueError(
            f"template {template.name!r} takes one turn, not {len(turns)}; expected one such as "
            "'vicuna_v1'"
        )
    for number, turn in enumerate(later, start=1):
        if IMAGE_PLACEHOLDER in turn:
            raise ValueError(f"turn {number} holds a literal {IMAGE_PLACEHOLDER!r}")
    if later:
        image = f"{IMAGE_PLACEHOLDER}\n" if has_image else ""
        prompt = training_prompt(template, [image + first, *later]) + template.assistant
    if system is None:
        return prompt
    if not template.opening.endswith(" "):
        raise ValueError(f"template {template.name!r} has no place for a system message")
    if IMAGE_PLACEHOLDER in system:
        raise ValueError(f"the system message holds a literal {IMAGE_PLACEHOLDER!r}")
    return f"{system} {prompt.removeprefix(template.opening)}"


def training_prompt(template: Template, turns: Sequence[str]) -> str:
    """The complete conversation as one string.

    Args:
      template: one with a training form.
      turns: texts of the human and the assistant in turn, the human first; exactly one pair for
        `plain`.

    Raises:
      ValueError: the template has no training form, or `plain` gets other than one pair.
    """
    if template.assistant_end is None:
        raise ValueError(
            f"template {template.name!r} is for evaluation only; expected 'vicuna_v1', 'llava_v1' "
            "or 'plain' for training"
        )
    if template.human is None:
        if len(turns) != 2:
            raise ValueError(
                f"template {template.name!r} got {len(turns)} turns; expected one human turn and "
                "one caption"
            )
        return IMAGE_PLACEHOLDER + turns[1] + template.assistant_end
    sides = (
        (template.human, template.human_end),
        (template.assistant, template.assistant_end),
    )
    text = template.opening
    for number, turn in enumerate(turns):
        role, end = sides[number % 2]
        text += _turn(role, template.gap, turn, end)
    return text


def _turn(role: str, gap: str, text: str, end: str) -> str:
    return role + gap + text + end if text else role


def sample_turns(sample: Mapping[str, Any]) -> list[str]:
    """The turns of a sample, human first, with `<image>\\n` moved to the front of its turn.

    A first turn that is not the human's is dropped. Several `<image>` in one turn become one.

    Raises:
      SampleError: the turns do not alternate, a role or the conversation is missing, or a sample
        with an image does not mention it in exactly one turn.
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
    if "image" not in sample:
        return texts
    mentions = sum(IMAGE_PLACEHOLDER in text for text in texts)
    if mentions != 1:
        raise SampleError(
            f"{name}: {IMAGE_PLACEHOLDER} appears in {mentions} turns; expected 1, as the sample "
            "has one image"
        )
    return [_image_first(text) for text in texts]


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

    Supervised are the answers and the `</s>` after each; for `plain` the caption and its newline.
    Nothing is truncated here.

    Args:
      tokenizer: its style says how `</s>` inside the text is read.
      sample: see the module's documentation.
      template: `vicuna_v1`, `llava_v1` or `plain`.
      protocol: whose label lengths.
      max_length: tokens that a sample is later cut to; a longer one is not checked for mismatch.

    Raises:
      SampleError: the sample breaks the format.
      ValueError: the template has no training form, or no such protocol.
    """
    turns = sample_turns(sample)
    if template.human is not None:
        text = training_prompt(template, turns)
        return label_rounds(tokenizer, template, text, "image" in sample, protocol, max_length)
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0]:
        raise SampleError(
            f"sample {sample.get('id', '(no id)')!r}: {len(turns)} turns, image: "
            f"{'image' in sample}; template {template.name!r} expects an image and a caption"
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
    return lambda text: [tokenizer.bos_id, *tokenizer.encode(text)]

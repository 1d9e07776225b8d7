"""Chat templates: how the turns of a conversation become one prompt.

A prompt is a sequence of parts: ordinary text, control tokens, and places of images and videos. The
template alone makes control tokens; a user's text that looks like one stays text. The templates are
those of LLaVA's, LLaVA-NeXT's and Video-LLaVA's `conversation.py`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER
from prumerge_jax.messages import quoted


class Part(NamedTuple):
    """A piece of a prompt.

    Attributes:
      text: its characters.
      kind: `text` is ordinary, `control` one control token, `visual` the place of an image or
        video.
    """

    text: str
    kind: Literal["text", "control", "visual"] = "text"


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
      controls: the strings above that are control tokens, which no user's text can become.
      labels: which tokens training learns, see `conversation.label_mask`.
      always_learnt: tokens that `turns` learns wherever they stand.
    """

    name: str
    opening: str
    human: str | None
    gap: str
    human_end: str
    assistant: str
    assistant_end: str | None
    controls: tuple[str, ...] = ("</s>",)
    labels: Literal["rounds", "answers", "turns"] = "rounds"
    always_learnt: tuple[str, ...] = ()


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
    assistant_end=" </s>",
    labels="answers",
)
_CHATML_DIRECT = Template(
    name="chatml_direct",
    opening="<|im_start|>system\nAnswer the questions.<|im_end|>",
    human="<|im_start|>user\n",
    gap="",
    human_end="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    assistant_end=None,
    controls=("<|im_start|>", "<|im_end|>"),
)
# What Hugging Face's Video-LLaVA shows; the model was trained with `llava_v1`.
_VIDEO_LLAVA_HF = dataclasses.replace(_VICUNA_V1, name="video_llava_hf", opening="")
_QWEN_1_5 = Template(
    name="qwen_1_5",
    opening="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    human="<|im_start|>user\n",
    gap="",
    human_end="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    assistant_end="<|im_end|>\n",
    controls=("<|im_start|>", "<|im_end|>"),
    labels="turns",
    always_learnt=("<|im_start|>", "<|im_end|>", "\n"),
)
_LLAVA_LLAMA_3 = Template(
    name="llava_llama_3",
    opening=(
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
        "assistant. You are able to understand the visual content that the user provides, and "
        "assist the user with a variety of tasks using natural language.<|eot_id|>"
    ),
    human="<|start_header_id|>user<|end_header_id|>\n\n",
    gap="",
    human_end="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    assistant_end="<|eot_id|>",
    controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    labels="turns",
    always_learnt=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n"),
)
# The reference outputs in Hugging Face's converter were made with this slip.
_LLAVA_LLAMA_3_DOUBLE = dataclasses.replace(
    _LLAVA_LLAMA_3,
    name="llava_llama_3_double_header",
    human="<|start_header_id|><|start_header_id|>user<|end_header_id|>\n\n",
)
TEMPLATES: Mapping[str, Template] = {
    "vicuna_v1": _VICUNA_V1,
    "v1": _VICUNA_V1,
    "llava_v1": _LLAVA_V1,
    "plain": _PLAIN,
    "mistral_instruct": _MISTRAL_INSTRUCT,
    "chatml_direct": _CHATML_DIRECT,
    "qwen_1_5": _QWEN_1_5,
    "llava_llama_3": _LLAVA_LLAMA_3,
    "llava_llama_3_double_header": _LLAVA_LLAMA_3_DOUBLE,
    "video_llava_hf": _VIDEO_LLAVA_HF,
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


def evaluation_parts(
    template: Template, text: str, visuals: Sequence[str] = (IMAGE_PLACEHOLDER,)
) -> list[Part]:
    """The prompt that asks `text`, ending where the answer begins; images and videos come first.

    Args:
      template: one that asks questions.
      text: the user's words.
      visuals: `<image>` or `<video>` for each image and video.

    Raises:
      ValueError: the text holds a literal `<image>`, or `<video>` where there is one, or the
        template has no evaluation form.
    """
    if template.human is None:
        raise ValueError(
            f"template {template.name!r} is for pre-training only; expected one that asks a "
            "question, such as 'vicuna_v1'"
        )
    for placeholder in {IMAGE_PLACEHOLDER: None, **dict.fromkeys(visuals)}:
        if placeholder in text:
            raise ValueError(
                f"the text holds a literal {placeholder!r} at character "
                f"{text.index(placeholder)}, which would be taken for an "
                f"{placeholder[1:-1]}; expected the user's words alone: the placeholder is added "
                "here"
            )
    text = "".join(f"{placeholder}\n" for placeholder in visuals) + text
    return prompt_parts(template, [text, ""], visuals)


def chat_parts(
    template: Template,
    turns: Sequence[str],
    visuals: Sequence[str] = (),
    system: str | None = None,
) -> list[Part]:
    """The prompt that continues a conversation, ending where the assistant's next turn begins.

    With one turn it is that of `evaluation_parts`.

    Args:
      template: one that asks questions.
      turns: texts of the human and the assistant in turn, the human's first and last.
      visuals: `<image>` or `<video>` for each image and video; they come before the first turn.
      system: what takes the place of the template's opening; None keeps it.

    Raises:
      ValueError: a turn holds a literal `<image>`, or the template has no evaluation form, takes
        one turn only, or has no opening in plain words.
    """
    first, *later = turns
    parts = evaluation_parts(template, first, visuals)
    if later and template.assistant_end is None:
        raise ValueError(
            f"template {template.name!r} takes one turn, not {len(turns)}; ask without the earlier "
            "ones"
        )
    for text in (*later, system or ""):
        if IMAGE_PLACEHOLDER in text:
            raise ValueError(
                f"a text holds a literal {IMAGE_PLACEHOLDER!r}, which would be taken for an image; "
                "expected words alone"
            )
    if system is not None and not template.opening.endswith(" "):
        raise ValueError(f"template {template.name!r} has no place for a system message")
    if later or system is not None:
        opened = template if system is None else dataclasses.replace(template, opening="")
        opening = [] if system is None else [Part(f"{system} ")]
        asked = "".join(f"{placeholder}\n" for placeholder in visuals) + first
        parts = merged([*opening, *prompt_parts(opened, [asked, *later, ""], visuals)])
    return parts


def prompt_parts(
    template: Template, turns: Sequence[str], places: Sequence[str] = ()
) -> list[Part]:
    """A conversation as parts, neighbouring text in one.

    Args:
      template: one with roles.
      turns: texts of the human and the assistant in turn, the human first; an empty one is its role
        alone, so that a last one ends the prompt where the answer begins.
      places: which of `<image>` and `<video>` are places in the turns; others are characters.
    """
    parts = list(_markup(template, template.opening))
    for number in range(len(turns)):
        parts += turn_parts(template, turns, number, places)
    return merged(parts)


def turn_parts(
    template: Template, turns: Sequence[str], number: int, places: Sequence[str] = ()
) -> list[Part]:
    """The parts of one turn, its role and its end included; arguments as in `prompt_parts`."""
    role, end = template.assistant, template.assistant_end or ""
    if number % 2 == 0:
        role, end = template.human or "", template.human_end
    text = turns[number]
    if not text:
        return list(_markup(template, role))
    words = [Part(piece, "visual" if n % 2 else "text") for n, piece in _split(text, places)]
    return merged([*_markup(template, role + template.gap), *words, *_markup(template, end)])


def training_prompt(template: Template, turns: Sequence[str]) -> str:
    """The complete conversation as one string of markup.

    Args:
      template: one with a training form.
      turns: as in `prompt_parts`; exactly one pair for `plain`.

    Raises:
      ValueError: the template has no training form, or `plain` gets other than one pair.
    """
    if template.assistant_end is None:
        raise ValueError(
            f"template {template.name!r} is for evaluation only; expected one of {trainable()} "
            "for training"
        )
    if template.human is None:
        if len(turns) != 2:
            raise ValueError(
                f"template {template.name!r} got {len(turns)} turns; expected one human turn and "
                "one caption"
            )
        return IMAGE_PLACEHOLDER + turns[1] + template.assistant_end
    return joined(prompt_parts(template, turns))


def trainable() -> list[str]:
    """Names of the templates that have a training form."""
    return sorted(name for name, t in TEMPLATES.items() if t.assistant_end is not None)


def joined(parts: Sequence[Part]) -> str:
    """A prompt as one string of markup."""
    return "".join(part.text for part in parts)


def merged(parts: Sequence[Part]) -> list[Part]:
    """The same prompt, neighbouring text in one part and none of it empty."""
    result: list[Part] = []
    for part in parts:
        if part.kind == "text" and result and result[-1].kind == "text":
            result[-1] = Part(result[-1].text + part.text)
        elif part.text:
            result.append(part)
    return result


def chunks(parts: Sequence[Part]) -> list[list[str]]:
    """The prompt cut at its images and videos; each chunk is text, control, text, ..., text."""
    result = [[""]]
    for part in parts:
        if part.kind == "visual":
            result.append([""])
        elif part.kind == "control":
            result[-1] += [part.text, ""]
        else:
            result[-1][-1] += part.text
    return result


def _markup(template: Template, text: str) -> Iterator[Part]:
    """A template's own string, its control tokens apart."""
    for number, piece in _split(text, template.controls):
        yield Part(piece, "control" if number % 2 else "text")


def _split(text: str, marks: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The text cut at these marks; the odd pieces are marks."""
    if not marks:
        return enumerate([text])
    return enumerate(re.split("(" + "|".join(map(re.escape, marks)) + ")", text))

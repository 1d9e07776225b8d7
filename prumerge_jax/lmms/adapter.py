"""Between lmms-eval's requests and `Llava`; nothing here needs lmms-eval.

lmms-eval sets Pillow to read images that are cut short, with which such a file decodes to grey
without an error. Around every call the flag is put to what our image reader asks for, and back.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import ImageFile

from prumerge_jax import reductions
from prumerge_jax.data.images import ImageMode
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.llava import Llava

NEW_TOKENS = 1024
"""Most tokens of an answer where a task does not say."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
      images: PIL images or paths, none for a question without one.
      text: the user's words; literal `<image>` are taken out.
      options: the task's generation options.
    """

    images: Sequence[Any]
    text: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Sampling:
    max_new_tokens: int
    temperature: float
    top_p: float


class Adapter:
    """A model that answers and scores.

    Args:
      checkpoint: a model directory, or `miniature`.
      reduction: its spelling; `;` may stand for `,`, at which lmms-eval splits arguments.
      conversation, position_ids, image_mode, dtype: as in `Llava`.
    """

    def __init__(
        self,
        checkpoint: str,
        reduction: str = "prumerge",
        *,
        conversation: str | None = None,
        position_ids: PositionIds = "compact",
        image_mode: ImageMode = "pad",
        dtype: str | None = None,
    ) -> None:
        spelling = reduction.replace(";", ",")
        reductions.parse(spelling)  # a mistake is told before the weights are read
        self.llava = Llava.load(checkpoint, dtype=dtype)
        self._how: dict[str, Any] = {
            "reduction": spelling,
            "conversation": conversation,
            "position_ids": position_ids,
            "image_mode": image_mode,
        }

    def generate(self, questions: Sequence[Question]) -> list[str]:
        """One answer per question, in order, cut where its `until` begins.

        Raises:
          ValueError: a question cannot be asked, or an option is not offered; none is skipped.
        """
        groups: dict[_Sampling, list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault(_sampling(question.options), []).append(number)
        answers = [""] * len(questions)
        for sampling, numbers in groups.items():
            asked = [questions[number] for number in numbers]
            with whole_images_only():
                texts = self.llava.generate(
                    [_images(each) for each in asked],
                    [_words(each.text) for each in asked],
                    **dataclasses.asdict(sampling),
                    **self._how,
                )
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = _cut(text, questions[number].options.get("until"))
        return answers

    def losses(self, questions: Sequence[Question], targets: Sequence[str]) -> list[float]:
        """The mean negative log-likelihood per token of each target, in nats.

        A target's leading space is left out: the prompt ends with one.
        """
        texts = [target.removeprefix(" ") for target in targets]
        with whole_images_only():
            scores = self.llava.score(
                [_images(each) for each in questions],
                [_words(each.text) for each in questions],
                texts,
                **self._how,
            )
        tokenizer = self.llava.tokenizer
        return [
            -score / len(tokenizer.encode(text)) for score, text in zip(scores, texts, strict=True)
        ]


@contextlib.contextmanager
def whole_images_only() -> Iterator[None]:
    """Images that are cut short are errors, whatever another library has set."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _sampling(options: Mapping[str, Any]) -> _Sampling:
    if int(options.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams is {options['num_beams']}; beam search is not offered")
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    top_p = options.get("top_p")
    return _Sampling(
        int(options.get("max_new_tokens") or NEW_TOKENS),
        temperature,
        1.0 if not top_p else float(top_p),
    )


def _images(question: Question) -> Any:
    return list(question.images) or None


def _words(text: str) -> str:
    """The text without the places of images, which the prompt makes itself."""
    return text.replace("<image>", "").strip()


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    marks = [until] if isinstance(until, str) else list(until or ())
    found = [at for mark in marks if mark and (at := text.find(mark)) >= 0]
    return text[: min(found, default=None)].strip()

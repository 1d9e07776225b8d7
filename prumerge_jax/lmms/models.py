"""The classes that lmms-eval makes of `--model prumerge_jax --model_args checkpoint=...`."""

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from prumerge_jax.lmms.adapter import Adapter, Question


class PruMergeSimple(lmms):
    """Tasks that give a text and images.

    Args:
      checkpoint, reduction, **options: see `Adapter`.
      batch_size, max_batch_size, device: lmms-eval's; the engine forms its own batches on the
        devices of jax.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        reduction: str = "prumerge",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._adapter = Adapter(checkpoint, reduction, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        return self._adapter.generate([self._question(*each.args) for each in requests])

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Losses: lmms-eval takes the smallest one.

        In `GenerationResult`, for lmms-eval 0.7.3 makes text of a bare pair.
        """
        questions, targets = [], []
        for each in requests:
            text, target, visual, doc_id, task, split = each.args
            document = self.task_dict[task][split][doc_id]
            questions.append(Question(_listed(visual(document)), text))
            targets.append(target(document) if callable(target) else target)
        losses = self._adapter.losses(questions, targets)
        return [GenerationResult((loss, True)) for loss in losses]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[tuple[str, ...]]:
        """Answers of all rounds; those of one round are given together."""
        rounds = [_Rounds(self.task_dict, *each.args) for each in requests]
        while running := [each for each in rounds if not each.ended]:
            answers = self._adapter.generate([each.question for each in running])
            for each, answer in zip(running, answers, strict=True):
                each.take(answer)
        return [tuple(each.answers) for each in rounds]

    def clean(self) -> None:
        """Holds nothing of PyTorch's that would have to be freed."""

    def _question(
        self,
        text: str,
        options: dict[str, Any],
        visual: Callable[[Any], Any],
        doc_id: Any,
        task: str,
        split: str,
    ) -> Question:
        return Question(_listed(visual(self.task_dict[task][split][doc_id])), text, options)


class PruMergeChat(PruMergeSimple):
    """Tasks that give messages; the texts of the user's are joined by lines."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        questions = []
        for each in requests:
            _, messages, options, doc_id, task, split = each.args
            images, text = _spoken(messages(self.task_dict[task][split][doc_id]))
            questions.append(Question(images, text, options))
        return self._adapter.generate(questions)


class _Rounds:
    """One request of several rounds.

    Attributes:
      question: of the present round.
      answers: so far.
      ended: the task wants no further round.
    """

    def __init__(
        self,
        documents: Any,
        text: str,
        options: dict[str, Any],
        visual: Callable[[Any], Any],
        next_round: Callable[..., Any],
        doc_id: Any,
        task: str,
        split: str,
    ) -> None:
        self._document = documents[task][split][doc_id]
        self._options, self._next_round, self._known = options, next_round, None
        self.question = Question(_listed(visual(self._document)), text, options)
        self.answers: list[str] = []
        self.ended = False

    def take(self, answer: str) -> None:
        """Ends a round."""
        self.answers.append(answer)
        images, text, self.ended, answers, self._known = self._next_round(
            self._document,
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self._known,
        )
        self.answers = list(answers)
        if not self.ended:
            self.question = Question(_listed(images), text, self._options)


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _spoken(messages: Sequence[Any]) -> tuple[list[Any], str]:
    """Images and text of messages."""
    images, texts = [], []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            raise ValueError("a task's messages hold an assistant's turn; expected questions alone")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image":
                images.append(part.get("url", part.get("image")))
            else:
                raise ValueError(f"a task's messages hold {part['type']!r}; expected text or image")
    return images, "\n".join(texts)

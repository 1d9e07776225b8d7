"""Answers of an engine by prompt, whole or as text piece by piece."""

from collections.abc import Iterable, Iterator, Sequence

from jax.sharding import Mesh

from prumerge_jax import sharding
from prumerge_jax.data.tokenizer import TextStream, Tokenizer
from prumerge_jax.engine.request import Answer, Delta


def in_order(answers: Iterable[Answer], prompt_of: Sequence[int]) -> list[Answer]:
    """Answers by key.

    Args:
      answers: one for each key from 0.
      prompt_of: the prompt of each key, which errors name.

    Raises:
      ValueError: an answer is an error.
    """
    found = {answer.key: _checked(answer, prompt_of[answer.key]) for answer in answers}
    return [found[key] for key in range(len(prompt_of))]


def text_pieces(
    events: Iterator[Delta | Answer], prompts: int, tokenizer: Tokenizer, mesh: Mesh | None
) -> Iterator[tuple[int, str]]:
    """Pairs of a prompt and the next piece of its answer, as they come.

    Args:
      events: of an engine that runs on `mesh`.
      prompts: how many there are.
      tokenizer: the model's.
      mesh: see above.

    Raises:
      ValueError: an answer is an error.
    """
    texts = [TextStream(tokenizer) for _ in range(prompts)]
    while True:
        with sharding.use_mesh(mesh):  # not while the caller has the piece
            event = next(events, None)
        if event is None:
            return
        if isinstance(event, Delta):
            piece = texts[event.key].push(event.token_ids)
        else:
            piece = texts[_checked(event, event.key).key].finish()
        if piece:
            yield event.key, piece


def _checked(answer: Answer, prompt: int) -> Answer:
    """The answer of a prompt, unless it is an error; that is raised."""
    if answer.error is not None:
        raise ValueError(f"prompt {prompt}: {answer.error}")
    return answer

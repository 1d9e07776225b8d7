"""MMTok (arXiv 2508.18264): patches that cover the words of the question, and the image itself."""

import dataclasses
import re
from typing import Annotated

import jax
import jax.numpy as jnp

from prumerge_jax.options import Bounds
from prumerge_jax.reductions import clustering, greedy
from prumerge_jax.reductions.base import Evidence
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Order, SetRule

INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""What LLaVA's benchmarks append to a question."""
UNSEEN_WORDS = frozenset((
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had",
    "do", "does", "did", "it", "they", "he", "she", "we", "you", "i", "what", "where", "when",
    "why", "how", "who", "which", "and", "or", "but", "so", "if", "then", "question", "answer",
    "to", "for", "with", "by", "from", "at", "into", "onto", "upon",
))  # fmt: skip
"""Words that say little of what is to be seen; the authors' list."""


def keywords(text: str) -> str:
    """The words of a question that say what is to be seen; the text itself where there are none.

    Instructions of benchmarks, punctuation and `UNSEEN_WORDS` are left out, as the authors do.
    """
    for instruction in INSTRUCTIONS:
        text = text.replace(instruction, "")
    words = [word for word in re.findall(r"\w+", text) if word.lower() not in UNSEEN_WORDS]
    return " ".join(words) if words else text.strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMTok(SetRule):
    """Greedy coverage of the question's words and of the image's own patches.

    The tokens of an image depend on the question, so that an image is encoded once per question.

    Attributes:
      alpha: weight of the patches' half.
      text_temperature, vision_temperature: of the softmax over patches.
      question_tokens: M, the most tokens that the keywords of a question may have.
    """

    alpha: Annotated[float, Bounds(0.0, 100.0)] = 0.5
    text_temperature: Annotated[float, Bounds(1e-4, 100.0)] = 0.02
    vision_temperature: Annotated[float, Bounds(1e-4, 100.0)] = 0.2
    question_tokens: Annotated[int, Bounds(1, 4096)] = 64

    @property
    def needs(self) -> frozenset[str]:
        """The question, and the patches in its space."""
        return frozenset({"projected", "question"})

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By the largest gain in coverage."""
        assert evidence.projected is not None
        assert evidence.question is not None
        rows = clustering.text_and_patch_rows(
            evidence.projected,
            evidence.hidden,
            *evidence.question,
            alpha=self.alpha,
            text_temperature=self.text_temperature,
            vision_temperature=self.vision_temperature,
        )
        patches, _ = greedy.coverage(rows, jnp.ones(available.shape), available, steps)
        return Order(patches)


register("mmtok", MMTok)

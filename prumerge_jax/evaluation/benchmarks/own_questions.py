"""Your own questions: a LLaVA question file without a benchmark's name."""

import pathlib
from collections.abc import Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question


class OwnQuestions(Benchmark[None]):
    """Answers without a score.

    The question file has lines `{question_id, image, text}`; a line without `image`, or with null
    there, is asked without one. There are no annotations.
    """

    name = "questions"
    needs_annotations = False
    scores = False

    def _image_of(self, row: jsonfiles.Row, where: str) -> str | None:
        return None if row.get("image") is None else jsonfiles.string(row, "image", where)

    def read_annotations(self, path: pathlib.Path) -> None:
        """Always refuses: nothing is scored."""
        raise ValueError(
            f"own questions have no score, so {path} is of no use; name the benchmark with "
            "--config.benchmark=NAME, or leave --config.annotations out"
        )

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: None
    ) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

"""Open questions about videos in Video-LLaVA's file forms: MSVD-QA, MSRVTT-QA, ActivityNet-QA.

arXiv 2311.10122; videollava/eval/video/run_inference_video_qa.py and eval_video_qa.py. A judge
compares every answer with the true one; nothing here calls it: `upload` writes what it reads,
`read_annotations` what it said.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, QuestionId
from prumerge_jax.evaluation.benchmarks.normalize import normalize_evalai

_MOST_POINTS = 5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge said of an answer: whether it is right, and 0 to 5 points."""

    is_right: bool
    points: int


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The true answers by question, and the judge's verdicts; none before it was asked."""

    truths: Mapping[str, str]
    verdicts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)


class VideoQa(Benchmark[Annotations]):
    """Questions `test_q.json`, a list of `{"video_name", "question", "question_id"}`.

    Annotations: `test_a.json`, a list of `{"answer", "question_id"}`; or a folder with it and with
    `judge.json`, the file of verdicts that eval_video_qa.py writes (`--output_json`). Without the
    judge the score is the share of answers that equal the true one after EvalAI's normalisation.
    """

    shows_videos = True
    max_new_tokens = 1024

    def __init__(self, name: str, prefix: str = "") -> None:
        """A benchmark.

        Args:
          name: key in the registry.
          prefix: what the names of video files have in front of those in the questions.
        """
        self.name, self._prefix = name, prefix
        self.headline = "exact_match"

    def read_questions(self, path: pathlib.Path) -> list[Question]:
        """Reads test_q.json."""
        questions = []
        for number, row in enumerate(jsonfiles.read_list(path), start=1):
            where = f"{path} entry {number}"
            questions.append(
                Question(
                    jsonfiles.field(row, "question_id", (int, str), where),
                    self._prefix + jsonfiles.string(row, "video_name", where),
                    jsonfiles.string(row, "question", where),
                )
            )
        self.check_distinct(questions, path)
        return questions

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads test_a.json, and judge.json if a folder has one."""
        file, judge = (path / "test_a.json", path / "judge.json") if path.is_dir() else (path, None)
        truths = {}
        for number, row in enumerate(jsonfiles.read_list(file), start=1):
            where = f"{file} entry {number}"
            key = str(jsonfiles.field(row, "question_id", (int, str), where))
            if key in truths:
                raise ValueError(f"{where} answers question_id {key!r:.80} again")
            truths[key] = jsonfiles.string(row, "answer", where)
        if judge is None or not judge.is_file():
            return Annotations(truths)
        return Annotations(truths, _read_verdicts(judge))

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """`exact_match`, and once the judge has spoken `accuracy` and `points` out of 5."""
        known = self.required(annotations)
        rows = self.in_question_order(questions, answers)
        truths = [self._truth(row["question_id"], known) for row in rows]
        values = {
            "exact_match": np.array(
                [
                    normalize_evalai(row["text"]) == normalize_evalai(truth)
                    for row, truth in zip(rows, truths, strict=True)
                ],
                np.float64,
            )
        }
        if known.verdicts:
            verdicts = [self._verdict(row["question_id"], known) for row in rows]
            values["accuracy"] = np.array([each.is_right for each in verdicts], np.float64)
            points = np.array([each.points for each in verdicts], np.float64)
            values["points"] = points / _MOST_POINTS
        return values

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """NAME_pred.json, the lines that eval_video_qa.py asks the judge about."""
        known = self.required(annotations)
        lines = [
            jsonfiles.dump_line(
                {
                    "id": question.question_id,
                    "question": question.text,
                    "answer": self._truth(question.question_id, known),
                    "pred": row["text"],
                }
            )
            for question, row in zip(
                questions, self.in_question_order(questions, answers), strict=True
            )
        ]
        return {f"{self.name}_pred.json": "".join(lines)}

    def _truth(self, question_id: QuestionId, annotations: Annotations) -> str:
        try:
            return annotations.truths[str(question_id)]
        except KeyError:
            raise ValueError(
                f"{self.name}: the annotations have no answer to question_id {question_id!r:.80}"
            ) from None

    def _verdict(self, question_id: QuestionId, annotations: Annotations) -> Verdict:
        try:
            return annotations.verdicts[str(question_id)]
        except KeyError:
            raise ValueError(
                f"{self.name}: judge.json has no verdict on question_id {question_id!r:.80}; ask "
                "the judge about all answers"
            ) from None


def _read_verdicts(path: pathlib.Path) -> dict[str, Verdict]:
    """Reads `{"<id>": [{"pred": "yes", "score": 4}, {...}], ...}`.

    As upstream, a `pred` with "yes" in it is right, and points are cut to an integer.
    """
    verdicts = {}
    for key, entry in jsonfiles.read_object(path).items():
        where = f"{path} entry {key!r:.80}"
        first = entry[0] if isinstance(entry, list) and entry else entry
        points = jsonfiles.field(first, "score", (int, float), where)
        if not 0 <= points <= _MOST_POINTS:
            raise ValueError(f"{where}: score is {points!r:.80}; expected 0 to {_MOST_POINTS}")
        said = jsonfiles.string(first, "pred", where).lower()
        if "yes" not in said and "no" not in said:
            raise ValueError(f"{where}: pred is {said!r:.80}; expected yes or no")
        verdicts[key] = Verdict("yes" in said, int(points))
    return verdicts


MSVD_QA = VideoQa("msvd_qa")
MSRVTT_QA = VideoQa("msrvtt_qa")
ACTIVITYNET_QA = VideoQa("activitynet_qa", prefix="v_")

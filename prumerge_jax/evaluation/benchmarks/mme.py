"""MME: two yes/no questions per image, 14 subtasks (arXiv 2306.13394).

Follows LLaVA's convert_answer_to_mme.py and MME's eval_tool/calculation.py.
"""

import pathlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, QuestionId

SUITES = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": (
        *("commonsense_reasoning", "numerical_calculation"),
        *("text_translation", "code_reasoning"),
    ),
}
_ASKED = "Answer the question using a single word or phrase."
_OFFICIAL = "Please answer yes or no."
_TO_SPACES = str.maketrans("\t\r\n", "   ")

Fact = tuple[str, str, str]
"""(subtask, name of the image's text file, official question)."""
Annotations = Mapping[Fact, str]
"""Yes or No."""


def parse(text: str) -> str:
    """`yes`, `no` or `other`: the official rule, which looks at the first four characters."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def fact_of(question_id: QuestionId, prompt: str, annotations: Annotations) -> Fact:
    """The official question of a prompt of LLaVA's question file.

    Raises:
      ValueError: The release has no such question. A prompt must be stored as it was asked.
    """
    subtask, *_, image = str(question_id).split("/")
    file = image.split(".")[0] + ".txt"
    question = prompt.replace(_ASKED, "").strip() if _ASKED in prompt else prompt
    candidates = [question]
    if _OFFICIAL not in question:
        # Some questions of the release have two spaces there.
        candidates = [f"{question} {_OFFICIAL}", f"{question}  {_OFFICIAL}"]
    for candidate in candidates:
        if (subtask, file, candidate) in annotations:
            return subtask, file, candidate
    raise ValueError(
        f"the MME release has no question {candidates[0]!r:.80} for {file:.80} of "
        f"{subtask:.80} (question_id {question_id!r:.80})"
    )


class Mme(Benchmark[Annotations]):
    """2374 questions, two per image; papers report the sum `perception` (at most 2000).

    Annotations: the folder MME_Benchmark_release_version, a folder per subtask with a text file of
    `question<TAB>answer` lines per image, alongside the images or in questions_answers_YN/.
    """

    name = "mme"
    headline = "perception"

    def key(self, question_id: QuestionId, prompt: str) -> Hashable:
        """(question_id, prompt): the two questions of an image share the id."""
        return question_id, prompt

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads all subtasks of the release."""
        annotations = {}
        for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
            split = folder / "questions_answers_YN"
            files = sorted((split if split.is_dir() else folder).glob("*.txt"))
            for file in files:
                lines = _read_text(file).rstrip("\n").split("\n")
                for number, line in enumerate(lines, start=1):
                    parts = line.strip().split("\t")
                    if len(parts) != 2 or parts[1].lower() not in ("yes", "no"):
                        raise ValueError(f"{file} line {number} is not a question, tab, Yes or No")
                    annotations[folder.name, file.name, parts[0]] = parts[1]
        if not annotations:
            raise ValueError(f"{path} holds no SUBTASK/*.txt: give the unpacked MME release")
        return annotations

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong per subtask (`accuracy_SUBTASK`)."""
        right = self._right_by_image(questions, answers, self.required(annotations))
        return {f"accuracy_{subtask}": pairs.ravel() for subtask, pairs in right.items()}

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """Per subtask accuracy, accuracy+ (both questions of an image right) and their sum.

        `perception` and `cognition`, the sums over a suite, are there when all its subtasks are.
        `unparsed` counts the answers that are neither yes nor no.
        """
        right = self._right_by_image(questions, answers, self.required(annotations))
        metrics: dict[str, float] = {}
        for subtask, pairs in right.items():
            accuracy, plus = 100 * float(pairs.mean()), 100 * float(pairs.all(axis=1).mean())
            metrics |= {
                f"accuracy_{subtask}": accuracy,
                f"accuracy_plus_{subtask}": plus,
                f"score_{subtask}": accuracy + plus,
            }
        for suite, subtasks in SUITES.items():
            if right.keys() >= set(subtasks):
                metrics[suite] = sum(metrics[f"score_{subtask}"] for subtask in subtasks)
        metrics["unparsed"] = float(sum(parse(row["text"]) == "other" for row in answers.rows))
        return metrics

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """mme/SUBTASK.txt for the official calculation.py.

        Its format has no escapes, so tabs and line ends inside an answer become spaces.
        """
        truths = self.required(annotations)
        lines: dict[str, list[str]] = {}
        for row in self.in_question_order(questions, answers):
            subtask, file, question = fact = fact_of(row["question_id"], row["prompt"], truths)
            text = row["text"].translate(_TO_SPACES)
            line = "\t".join([file, question, truths[fact], text])
            lines.setdefault(subtask, []).append(line + "\n")
        return {f"mme/{subtask}.txt": "".join(content) for subtask, content in lines.items()}

    def _right_by_image(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations
    ) -> dict[str, np.ndarray]:
        """By subtask: [images, 2] float64, 1 where the answer is right."""
        known = {subtask for subtasks in SUITES.values() for subtask in subtasks}
        right: dict[str, dict[str, list[float]]] = {}
        for row in self.in_question_order(questions, answers):
            subtask, file, _ = fact = fact_of(row["question_id"], row["prompt"], annotations)
            if subtask not in known:
                raise ValueError(
                    f"MME has no subtask {subtask!r:.80} (question_id {row['question_id']!r:.80})"
                )
            images = right.setdefault(subtask, {})
            correct = parse(row["text"]) == annotations[fact].lower()
            images.setdefault(file, []).append(float(correct))
        for subtask, images in right.items():
            for file, answered in images.items():
                if len(answered) != 2:
                    raise ValueError(
                        f"{len(answered)} questions about {file:.80} of {subtask} instead of 2"
                    )
        return {subtask: np.array(list(images.values())) for subtask, images in right.items()}


def _read_text(file: pathlib.Path) -> str:
    try:
        return jsonfiles.read_file(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error

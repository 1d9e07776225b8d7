"""One benchmark with one reduction: from the question file to answers and metrics.

Answers go through the journal, so a run that is killed goes on where it was and a rerun scores
nothing twice. A row that cannot be scored becomes a line of `errors.jsonl` and disturbs no other.
"""

import collections
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import tqdm

from prumerge_jax.data.conversation import chat_template
from prumerge_jax.data.images import ImageProcessor
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.build import Draft, RequestBuilder
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import MAX_SEED, Answer, SamplingParams
from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers, complete_row
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question
from prumerge_jax.evaluation.journal import Journal, Outcome
from prumerge_jax.llava import Llava
from prumerge_jax.reductions import Reduction, spell
from prumerge_jax.store.manifest import MANIFEST

RUN_FIGURES = frozenset(
    {"rows_failed", "images_per_second", "token_efficiency"}
    | {f"visual_tokens_{name}" for name in ("mean", "p50", "p95", "max")}
    | {"text_tokens_mean", "new_tokens_mean"}
)
"""Metrics that describe the run and not the answers."""

COMMIT_ROWS = 32
COMMIT_SECONDS = 5.0
"""Answers become durable in batches of so many rows, or after so long."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark's files.

    Attributes:
      benchmark: the benchmark.
      questions: its question file.
      images: folder that the questions' image paths are relative to; None if they have none.
      annotations: what the scorer compares with; None where a server or a judge knows.
    """

    benchmark: Benchmark[Any]
    questions: pathlib.Path
    images: pathlib.Path | None
    annotations: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
      protocol: whose image handling, see `benchmark.PROTOCOLS`.
      conversation: prompt template.
      position_ids: see `packing.pack_window`.
      max_new_tokens: None takes the benchmark's own limit.
      temperature, top_p: 0 is greedy.
      seed: row i draws with seed + i.
      num_workers: processes that decode images.
    """

    protocol: str = "llava-1.6"
    conversation: str = "vicuna_v1"
    position_ids: PositionIds = "compact"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_workers: int = 0


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a run gives.

    Attributes:
      metrics: the benchmark's metrics and the run's figures, one flat mapping. A figure that this
        run did not measure (speed, when all answers were there already) is None.
      per_question: values per question by metric, empty where rows are missing.
      visual_tokens: int [answered rows that have an image].
      failed: rows without an answer.
    """

    metrics: dict[str, float | None]
    per_question: dict[str, np.ndarray]
    visual_tokens: np.ndarray
    failed: int


class Rows:
    """A task's questions, read and checked before anything expensive starts."""

    def __init__(self, task: Task) -> None:
        """Reads questions and annotations.

        Raises:
          ValueError: a file is malformed; the message names file and row.
          FileNotFoundError: a file does not exist.
        """
        self.task = task
        self.questions = task.benchmark.read_questions(task.questions)
        self.annotations = None
        if task.annotations is not None:
            self.annotations = task.benchmark.read_annotations(task.annotations)
        elif task.benchmark.needs_annotations:
            raise ValueError(
                f"{task.benchmark.name} cannot be scored without annotations; pass "
                "--config.annotations=PATH"
            )

    def check_images(self) -> None:
        """Raises FileNotFoundError if the questions' images cannot be there; for a model's run."""
        folder = self.task.images
        by_path = any(isinstance(question.image, str) for question in self.questions)
        if by_path and (folder is None or not folder.is_dir()):
            raise FileNotFoundError(
                f"image folder {folder} does not exist; pass --config.images=DIR"
            )

    def score(self, answers: Answers) -> dict[str, float]:
        """All metrics of a complete answers file."""
        return self.task.benchmark.score(self.questions, answers, self.annotations)


def score_answers(task: Task, answers: Answers, workdir: pathlib.Path) -> dict[str, float]:
    """Scores an existing answers file and writes its upload files; no model."""
    rows = Rows(task)
    metrics = rows.score(answers)
    task.benchmark.upload(rows.questions, answers, rows.annotations, workdir)
    return metrics


def run(
    model: Llava,
    weights: str,
    rows: Rows,
    reduction: Reduction,
    decoding: Decoding,
    workdir: pathlib.Path,
) -> Scored:
    """Answers all questions that `workdir` has no answer to yet, then scores.

    Writes `journal.jsonl`, `answers.jsonl`, `errors.jsonl` and the benchmark's upload files.

    Args:
      model: the model.
      weights: hash of its weights, see `weights_hash`.
      rows: the questions.
      reduction: what happens to the visual tokens.
      decoding: how answers are made.
      workdir: an existing folder.

    Raises:
      ValueError: the workdir belongs to another run; the message names the difference.
      RuntimeError: another process writes to the workdir.
    """
    benchmark, questions = rows.task.benchmark, rows.questions
    fingerprint = _fingerprint(model, weights, rows, reduction, decoding)
    with Journal(workdir / "journal.jsonl", fingerprint, len(questions)) as journal:
        todo = journal.unanswered
        answerer = _Answerer(model, rows, reduction, decoding, fingerprint)
        engine = answerer.engine()
        with model.placed():
            if todo:
                engine.warm_up()
            started = time.monotonic()
            _commit(journal, answerer.outcomes(engine, todo), len(todo), engine)
        seconds = time.monotonic() - started
        journal.write_results(workdir)
        outcomes = [journal.outcomes[index] for index in range(len(questions))]

    answered = [dict(o.answer) for o in outcomes if o.answer is not None]
    failed = len(outcomes) - len(answered)
    metrics: dict[str, float | None] = {}
    per_question: dict[str, np.ndarray] = {}
    if not failed:
        answers = Answers(str(workdir / "answers.jsonl"), answered)
        metrics.update(rows.score(answers))
        if rows.annotations is not None or not benchmark.needs_annotations:
            per_question = benchmark.per_question(questions, answers, rows.annotations)
        benchmark.upload(questions, answers, rows.annotations, workdir)
    counts = np.array(
        [
            o.measured["visual_tokens"]
            for o in outcomes
            if o.answer is not None and questions[o.index].image is not None
        ]
    )
    metrics["rows_failed"] = failed
    metrics["images_per_second"] = len(todo) / seconds if todo else None
    metrics.update(_count_figures(counts))
    for name in ("text_tokens", "new_tokens"):
        values = [o.measured[name] for o in outcomes if o.answer is not None]
        metrics[f"{name}_mean"] = float(np.mean(values)) if values else None
    counters = engine.counters
    if counters.row_tokens:
        metrics["token_efficiency"] = counters.real_tokens / counters.row_tokens
    return Scored(metrics, per_question, counts, failed)


def weights_hash(directory: pathlib.Path) -> str:
    """SHA-256 of a converted directory's manifest, which holds the hash of every file."""
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()


class _Answerer:
    """Turns row indices into outcomes."""

    def __init__(
        self,
        model: Llava,
        rows: Rows,
        reduction: Reduction,
        decoding: Decoding,
        fingerprint: dict[str, Any],
    ) -> None:
        self.model, self.rows, self.reduction = model, rows, reduction
        self.decoding, self.fingerprint = decoding, fingerprint
        limit = decoding.max_new_tokens
        if limit is None:
            limit = rows.task.benchmark.max_new_tokens
        self.sampling = SamplingParams(
            decoding.temperature, decoding.top_p, limit, seed=decoding.seed
        )
        vision = model.config.vision
        mode = rows.task.benchmark.image_mode(decoding.protocol)
        self.builder = RequestBuilder(
            model.tokenizer,
            chat_template(decoding.conversation),
            ImageProcessor(model.image_size(reduction), vision.pixel_mean, mode),
            decoding.num_workers,
        )
        self.prompts = [self._prompt(question) for question in rows.questions]
        self.refused: collections.deque[Outcome] = collections.deque()

    def engine(self) -> Engine:
        """An engine fitted to all questions, so that a run which resumes has the same shapes."""
        lengths = [
            int(np.count_nonzero(prompt != IMAGE_TOKEN))
            for prompt in self.prompts
            if isinstance(prompt, np.ndarray)
        ]
        return self.model.engine(
            self.reduction,
            lengths,
            max_new_tokens=self.sampling.max_new_tokens,
            position_ids=self.decoding.position_ids,
        )

    def outcomes(self, engine: Engine, todo: list[int]) -> Iterator[Outcome]:
        """One outcome per row, in any order."""
        for answer in engine.generate(self.builder.requests(self._drafts(todo), self._refuse)):
            yield from self._take_refused()
            yield self._outcome(answer)
        yield from self._take_refused()

    def _refuse(self, index: int, error: ValueError) -> None:
        question_id = self.rows.questions[index].question_id
        self.refused.append(Outcome(index, question_id, error=str(error)))

    def _take_refused(self) -> Iterator[Outcome]:
        while self.refused:
            yield self.refused.popleft()

    def _drafts(self, todo: list[int]) -> Iterator[Draft]:
        for index in todo:
            prompt = self.prompts[index]
            if isinstance(prompt, ValueError):
                self._refuse(index, prompt)
                continue
            seed = (self.sampling.seed + index) % MAX_SEED
            sampling = dataclasses.replace(self.sampling, seed=seed)
            yield Draft(index, prompt, self._image(index), sampling=sampling)

    def _prompt(self, question: Question) -> np.ndarray | ValueError:
        """Token ids [T] int32, or why there are none."""
        try:
            return self.builder.token_ids(question.text, int(question.image is not None))
        except ValueError as error:
            return error

    def _image(self, index: int) -> tuple[str, Any] | None:
        image = self.rows.questions[index].image
        if image is None:
            return None
        if isinstance(image, bytes):
            return f"image of row {index + 1}", image
        assert self.rows.task.images is not None  # Rows checked it
        path = self.rows.task.images / image
        return str(path), path

    def _outcome(self, result: Answer) -> Outcome:
        question: Question = self.rows.questions[result.key]
        if result.error is not None:
            return Outcome(result.key, question.question_id, error=result.error)
        text = self.model.tokenizer.decode(result.token_ids)
        answer = complete_row(
            self.rows.task.benchmark.answer_row(question, text),
            index=result.key,
            fingerprint=self.fingerprint,
            model_id=str(self.fingerprint["model_id"]),
        )
        measured = result.usage._asdict()
        return Outcome(result.key, question.question_id, answer=answer, measured=measured)


def _commit(journal: Journal, outcomes: Iterator[Outcome], total: int, engine: Engine) -> None:
    """Appends outcomes to the journal in batches, with a progress bar."""
    batch: list[Outcome] = []
    last = time.monotonic()
    with tqdm.tqdm(total=total, unit="image", disable=None) as bar:
        for outcome in outcomes:
            batch.append(outcome)
            if len(batch) >= COMMIT_ROWS or time.monotonic() - last > COMMIT_SECONDS:
                journal.append(batch)
                batch, last = [], time.monotonic()
            bar.update()
            counters = engine.counters
            if counters.images and counters.row_tokens:
                kept = counters.visual_tokens / counters.images
                padding = 1 - counters.real_tokens / counters.row_tokens
                bar.set_postfix_str(f"tokens {kept:.1f}, padding {padding:.1%}", refresh=False)
        journal.append(batch)


def _fingerprint(
    model: Llava, weights: str, rows: Rows, reduction: Reduction, decoding: Decoding
) -> dict[str, Any]:
    """All that determines the answers."""
    settings = dataclasses.asdict(decoding)
    del settings["num_workers"]
    return {
        "weights": weights,
        "model_id": weights[:12],
        "dtype": str(model.dtype),
        "benchmark": rows.task.benchmark.name,
        "questions": hashlib.sha256(rows.task.questions.read_bytes()).hexdigest(),
        "reduction": spell(reduction),
        "image_size": model.image_size(reduction),
        "code": metadata.version("prumerge-jax"),
        **settings,
    }


def _count_figures(counts: np.ndarray) -> dict[str, float | None]:
    """Mean and percentiles of the visual tokens per image."""
    names = ("mean", "p50", "p95", "max")
    if not len(counts):
        return {f"visual_tokens_{name}": None for name in names}
    figures = (counts.mean(), *np.percentile(counts, [50, 95]), counts.max())
    return {
        f"visual_tokens_{name}": float(value) for name, value in zip(names, figures, strict=True)
    }


def write_metrics(path: pathlib.Path, metrics: dict[str, float | None]) -> None:
    """One flat JSON object."""
    jsonfiles.replace_file(path, jsonfiles.dump_line(metrics))

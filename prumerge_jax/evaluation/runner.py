"""One benchmark with one reduction: from the question file to answers and metrics.

Answers go through the journal, so a run that is killed resumes where it was and a rerun scores
nothing twice. A row that cannot be scored becomes a line of `errors.jsonl` and disturbs no other.
"""

import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import tqdm

from prumerge_jax.data.images import VideoFile
from prumerge_jax.data.loading import Named
from prumerge_jax.data.pictures import PictureMode, default_mode
from prumerge_jax.engine.build import Draft, RequestBuilder
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import MAX_SEED, Answer, SamplingParams
from prumerge_jax.evaluation import jsonfiles, shares
from prumerge_jax.evaluation.answers import Answers, Fingerprint, complete_row
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.config import Decoding
from prumerge_jax.evaluation.journal import Journal, RowOutcome
from prumerge_jax.evaluation.order import by_image
from prumerge_jax.evaluation.questions import Task, TaskQuestions, video_file
from prumerge_jax.llava import Llava
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.reductions import Reduction, spell
from prumerge_jax.sharding.agreement import gather, is_leader

RUN_FIGURES = frozenset(
    {"rows_failed", "images_per_second", "questions_per_second", "token_efficiency"}
    | {"computed_over_request_tokens"}
    | {f"visual_tokens_{name}" for name in ("mean", "p50", "p95", "max", "cv", "below_16")}
    | {"text_tokens_mean", "new_tokens_mean"}
)
"""Metrics that describe the run and not the answers."""

COMMIT_ROWS = 32
COMMIT_SECONDS = 5.0
"""Answers become durable in batches of this many rows, or after this time."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What `answer` did, all processes together.

    Attributes:
      outcomes: one per row, in order; those of earlier runs too.
      questions: number of rows answered now.
      images: number of images encoded now. Rows of one image share its encoding.
      seconds: wall time of that, compilation left out; of the slowest process.
      token_efficiency: real tokens over computed ones; None where nothing was computed.
      computed_over_request_tokens: real tokens of the rows over those of the questions' prompts,
        below 1 where questions share what is in front of them; None where nothing was computed.
    """

    outcomes: Sequence[RowOutcome]
    questions: int
    images: int
    seconds: float
    token_efficiency: float | None
    computed_over_request_tokens: float | None


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The result of a run.

    Attributes:
      metrics: the benchmark's metrics and the run's figures, one flat mapping. A figure that this
        run did not measure (speed, when all answers were there already) is None.
      per_question: values per question by metric, empty where rows are missing.
      visual_tokens: int [answered rows that have an image].
      failed: rows without an answer.
      answers: lines of the answered rows.
      problems: what could not be written although it was due, one sentence each.
    """

    metrics: dict[str, float | None]
    per_question: Mapping[str, np.ndarray]
    visual_tokens: np.ndarray
    failed: int
    answers: Answers
    problems: tuple[str, ...] = ()


def run(
    model: Llava,
    rows: TaskQuestions,
    reduction: Reduction,
    decoding: Decoding,
    fingerprint: Fingerprint,
    workdir: pathlib.Path,
) -> RunScores:
    """Answers all questions that `workdir` has no answer to yet, then scores.

    Writes `journal.jsonl`, `answers.jsonl`, `errors.jsonl`, `metrics.json`, and after them the
    benchmark's upload files; a failure of these is one of the result's problems. Of several
    processes each answers its share and writes its journal, process 0 everything else.

    Args:
      model: the model.
      rows: the questions.
      reduction: what happens to the visual tokens.
      decoding: how answers are made.
      fingerprint: all that determines the answers, see `fingerprint`.
      workdir: an existing folder.

    Raises:
      ValueError: the workdir belongs to another run; the message names the difference.
      RuntimeError: another process writes to the workdir.
      OSError: a file could not be written; the journal holds what was answered before.
    """
    answered = answer(model, rows, reduction, decoding, fingerprint, workdir)
    scores = summarise(rows, answered, str(workdir / "answers.jsonl"))
    if not is_leader():
        return scores
    write_metrics(workdir / "metrics.json", scores.metrics)
    if not scores.failed:
        try:
            rows.upload(scores.answers, workdir)
        except (OSError, ValueError) as error:
            problem = f"{rows.task.benchmark.name}: no upload file: {error}"
            scores = dataclasses.replace(scores, problems=(problem,))
    return scores


def answer(
    model: Llava,
    rows: TaskQuestions,
    reduction: Reduction,
    decoding: Decoding,
    fingerprint: Fingerprint,
    workdir: pathlib.Path,
) -> Answered:
    """Answers all questions that the journals in `workdir` have no answer to yet.

    Arguments and errors as in `run`.
    """
    num_rows = len(rows.questions)
    with shares.open_journal(workdir, fingerprint, num_rows) as journal:
        shared = shares.share_out(
            journal.unanswered,
            [rows.questions[index].image for index in journal.unanswered],
            jax.process_count(),
        )
        shares.check_agreed(journal.unanswered, workdir)
        refused = {index: rows.refusal(index) for index in shared[jax.process_index()]}
        journal.append(
            [
                RowOutcome(index, rows.questions[index].question_id, error=reason)
                for index, reason in refused.items()
                if reason is not None
            ]
        )
        allowed = [index for index, reason in refused.items() if reason is None]
        todo = by_image(allowed, rows.questions)
        answerer = _Answerer(model, rows, reduction, decoding, dict(fingerprint))
        engine = answerer.engine()
        with model.placed():
            if todo:
                engine.warm_up(videos=rows.task.benchmark.shows_videos)
            started = time.monotonic()
            _commit(journal, answerer.outcomes(engine, todo), len(todo), engine)
        seconds = time.monotonic() - started
        counters = engine.counters
        figures = gather(
            [
                seconds,
                counters.images,
                counters.request_tokens,
                counters.real_tokens,
                counters.row_tokens,
            ]
        )
        shares.collect(journal, workdir, fingerprint, num_rows, shared)
        if is_leader():
            journal.write_results(workdir)
        outcomes = [journal.outcomes[index] for index in range(num_rows)]
    taken, images, *tokens = zip(*figures, strict=True)
    asked, real, computed = (sum(each) for each in tokens)
    return Answered(
        outcomes=outcomes,
        questions=sum(outcomes[index].answer is not None for index in itertools.chain(*shared)),
        images=sum(images),
        seconds=max(taken),
        token_efficiency=real / computed if computed else None,
        computed_over_request_tokens=real / asked if asked else None,
    )


def summarise(rows: TaskQuestions, answered: Answered, source: str) -> RunScores:
    """Metrics of a run; those of the benchmark only if every row was answered.

    Args:
      rows: the questions.
      answered: their outcomes.
      source: name of the answers file in error messages.
    """
    done = [outcome for outcome in answered.outcomes if outcome.answer is not None]
    failed = len(answered.outcomes) - len(done)
    answers = Answers(source, [dict(outcome.answer or {}) for outcome in done])
    metrics: dict[str, float | None] = {}
    per_question: Mapping[str, np.ndarray] = {}
    if not failed:
        metrics.update(rows.score(answers))
        per_question = rows.per_question(answers)
    counts = np.array(
        [
            outcome.measured["visual_tokens"]
            for outcome in done
            if rows.questions[outcome.index].image is not None
        ],
        np.int64,
    )
    metrics["rows_failed"] = failed
    for name in ("images", "questions"):
        count = getattr(answered, name)
        metrics[f"{name}_per_second"] = count / answered.seconds if count else None
    metrics.update(_count_figures(counts))
    for name in ("text_tokens", "new_tokens"):
        values = [outcome.measured[name] for outcome in done]
        metrics[f"{name}_mean"] = float(np.mean(values)) if values else None
    for name in ("token_efficiency", "computed_over_request_tokens"):
        metrics[name] = getattr(answered, name)
    return RunScores(metrics, per_question, counts, failed, answers)


class _Answerer:
    """Turns row indices into outcomes."""

    def __init__(
        self,
        model: Llava,
        rows: TaskQuestions,
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
        self.builder = RequestBuilder(
            model.tokenizer,
            model.template(decoding.conversation),
            model.processor(picture_mode(model.config, rows.task, decoding), reduction),
            decoding.num_workers,
        )
        self.prompts = [self._prompt(question) for question in rows.questions]
        self.first_row: dict[bytes, int] = {}  # that has these bytes for an image
        for index, question in enumerate(rows.questions):
            if isinstance(question.image, bytes):
                self.first_row.setdefault(question.image, index)
        self.refused: collections.deque[RowOutcome] = collections.deque()

    def engine(self) -> Engine:
        """An engine fitted to all questions, so that a run which resumes has the same shapes."""
        drafts = []
        for index in by_image(range(len(self.prompts)), self.rows.questions):
            prompt = self.prompts[index]
            if isinstance(prompt, np.ndarray):
                images = self._images(index)
                layouts = self.builder.images.layouts(images)
                drafts.append(Draft(index, prompt, images, layouts=layouts))
        return self.model.engine(
            self.reduction,
            drafts,
            max_new_tokens=self.sampling.max_new_tokens,
            position_ids=self.decoding.position_ids,
        )

    def outcomes(self, engine: Engine, todo: list[int]) -> Iterator[RowOutcome]:
        """One outcome per row, in any order."""
        for answer in engine.generate(self.builder.requests(self._drafts(todo), self._refuse)):
            yield from self._take_refused()
            yield self._outcome(answer)
        yield from self._take_refused()

    def _refuse(self, index: int, error: ValueError) -> None:
        question_id = self.rows.questions[index].question_id
        self.refused.append(RowOutcome(index, question_id, error=str(error)))

    def _take_refused(self) -> Iterator[RowOutcome]:
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
            asked = self.builder.question_ids(self.rows.questions[index].text)
            yield Draft(index, prompt, self._images(index), sampling=sampling, question_ids=asked)

    def _prompt(self, question: Question) -> np.ndarray | ValueError:
        """Token ids [T] int32, or why there are none."""
        try:
            return self.builder.token_ids(question.text, int(question.image is not None))
        except ValueError as error:
            return error

    def _images(self, index: int) -> tuple[Named, ...]:
        image = self.rows.questions[index].image
        if image is None:
            return ()
        if isinstance(image, bytes):
            return ((f"image of row {self.first_row[image] + 1}", image),)
        assert self.rows.task.images is not None  # Rows checked it
        path = self.rows.task.images / image
        if self.rows.task.benchmark.shows_videos:
            path = video_file(path)
            return ((str(path), VideoFile(path)),)
        return ((str(path), path),)

    def _outcome(self, result: Answer) -> RowOutcome:
        question: Question = self.rows.questions[result.key]
        if result.error is not None:
            return RowOutcome(result.key, question.question_id, error=result.error)
        text = self.model.tokenizer.decode(result.token_ids)
        answer = complete_row(
            self.rows.task.benchmark.answer_row(question, text),
            index=result.key,
            fingerprint=self.fingerprint,
            model_id=str(self.fingerprint["model_id"]),
        )
        measured = result.usage._asdict()
        return RowOutcome(result.key, question.question_id, answer=answer, measured=measured)


def _commit(journal: Journal, outcomes: Iterator[RowOutcome], total: int, engine: Engine) -> None:
    """Appends outcomes to the journal in batches, with a progress bar in process 0."""
    batch: list[RowOutcome] = []
    last = time.monotonic()
    hidden = None if is_leader() else True  # None: where nobody looks
    with tqdm.tqdm(total=total, unit="question", disable=hidden) as bar:
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


def fingerprint(
    weights: str, dtype: str, task: Task, reduction: Reduction, decoding: Decoding
) -> Fingerprint:
    """All that determines the answers.

    Args:
      weights: hash of the model's weights, see `manifest.weights_identity`.
      dtype: compute dtype.
      task: the questions' file.
      reduction: what happens to the visual tokens.
      decoding: how answers are made.
    """
    settings = dataclasses.asdict(decoding)
    del settings["num_workers"]
    return {
        "weights": weights,
        "model_id": weights[:12],
        "dtype": dtype,
        "benchmark": task.benchmark.name,
        "questions": hashlib.sha256(task.questions.read_bytes()).hexdigest(),
        "reduction": spell(reduction),
        "code": metadata.version("prumerge-jax"),
        **settings,
    }


def _count_figures(counts: np.ndarray) -> dict[str, float | None]:
    """Mean, percentiles, coefficient of variation and share below 16 of the visual tokens per
    image."""
    names = ("mean", "p50", "p95", "max", "cv", "below_16")
    if not len(counts):
        return {f"visual_tokens_{name}": None for name in names}
    mean = counts.mean()
    spread = counts.std() / mean if mean else 0
    percentiles = np.percentile(counts, [50, 95])
    figures = (mean, *percentiles, counts.max(), spread, (counts < 16).mean())
    return {
        f"visual_tokens_{name}": float(value) for name, value in zip(names, figures, strict=True)
    }


def picture_mode(config: LlavaConfig, task: Task, decoding: Decoding) -> PictureMode:
    """How images become pixels: where the family pads them, as the benchmark wants."""
    own = default_mode(config)
    return task.benchmark.image_mode(decoding.protocol) if own == "pad" else own


def write_metrics(path: pathlib.Path, metrics: Mapping[str, float | None]) -> None:
    """One flat JSON object; a metric that is not a finite number is null."""
    finite = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in metrics.items()
    }
    jsonfiles.replace_file(path, jsonfiles.dump_line(finite))

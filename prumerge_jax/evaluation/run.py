"""Several benchmarks with several reductions in one run: table, report, exit status."""

import json
import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections

from prumerge_jax import reductions
from prumerge_jax.cost import Bits
from prumerge_jax.data.pictures import default_mode
from prumerge_jax.evaluation import runner, summary
from prumerge_jax.evaluation.answers import read_answers
from prumerge_jax.evaluation.config import EvalConfig, parse_config
from prumerge_jax.evaluation.plan import Plan, Run, plan_runs, read_questions
from prumerge_jax.evaluation.questions import TaskQuestions
from prumerge_jax.evaluation.summary import ScoredRun
from prumerge_jax.llava import Llava
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.sharding.agreement import is_leader, leader_first, require_same

ALL_ANSWERED, NOT_WRITTEN, SOME_FAILED = 0, 1, 3
"""Exit statuses."""


def evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
    """Runs what a configuration of `configs/eval.py` asks for; returns the exit status.

    Writes per benchmark and reduction what `runner.run` writes, and over all of them
    `report.html`. With one benchmark and one reduction everything is stored in `workdir` itself,
    otherwise in `workdir/BENCHMARK/REDUCTION`.

    Several processes (`jax.distributed`) share the questions, each with the model on devices of
    its own; they must call it with the same arguments. Process 0 writes and prints the results.

    Returns:
      0 if every row was scored, 3 if some failed, 1 if a file that was due could not be written.

    Raises:
      ValueError: the configuration, or a file it names, is wrong; the message says where.
      OSError: a file cannot be read, or an answer cannot be stored.
    """
    _require_same_flags(config)
    settings = parse_config(config)
    if settings.answers is not None:
        return _score_answers(settings, settings.answers, workdir)
    plan = leader_first(lambda: plan_runs(settings, workdir))
    _require_same_files(plan)
    _say_notes(plan.questions)
    model = Llava.load(
        plan.checkpoint,
        dtype=settings.dtype,
        engine=settings.engine,
        mesh=plan.mesh,
        quantize=settings.quantize,
        cache_dtype=settings.cache_dtype,
    )
    return _report(plan, model, _score_runs(plan, model))


def _require_same_flags(config: ml_collections.ConfigDict) -> None:
    leaves = jax.tree.leaves_with_path(json.loads(config.to_json()), is_leaf=lambda x: x is None)
    flags = {
        f"--config.{jax.tree_util.keystr(path, simple=True, separator='.')}": value
        for path, value in leaves
    }
    require_same(flags, "start all processes with the same flags")


def _require_same_files(plan: Plan) -> None:
    for run in plan.runs:
        require_same(run.fingerprint, "give all processes the same checkpoint, questions and code")


def _score_runs(plan: Plan, model: Llava) -> list[ScoredRun]:
    """Scores every run, its baselines after it."""
    scored: list[ScoredRun] = []
    for run in plan.runs:
        scored.append(_score(run, model))
        if plan.config.baselines:
            taken = {r.name for r in plan.runs} | {
                s.run.name for s in scored if s.run.questions is run.questions
            }
            for name in _baselines(scored[-1], model.config):
                if name not in taken:
                    scored.append(_score(plan.run(run.questions, name), model))
    return scored


def _score(run: Run, model: Llava) -> ScoredRun:
    if is_leader():
        print(f"{run.questions.task.benchmark.name}, {run.name}", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    scores = runner.run(
        model, run.questions, run.reduction, run.decoding, run.fingerprint, run.folder
    )
    return ScoredRun(run, scores)


def _baselines(scored: ScoredRun, model: LlavaConfig) -> list[str]:
    """Reductions with as many tokens, but without a method: random, uniform, and where an image is
    one crop a smaller image."""
    counts = scored.scores.visual_tokens
    baselines = reductions.equal_count_baselines(scored.run.name)
    if not counts.size or not baselines:
        return []
    if default_mode(model) == "anyres" or scored.run.questions.task.benchmark.shows_videos:
        return list(baselines)
    side = min(round(math.sqrt(counts.mean())), model.vision.grid - 1)
    return [*baselines, f"downsample:{max(side, 1)}"]


def _report(plan: Plan, model: Llava, scored: list[ScoredRun]) -> int:
    """Prints the table, writes the report; returns the exit status."""
    failed = sum(entry.scores.failed for entry in scored)
    if not is_leader():
        return SOME_FAILED if failed else ALL_ANSWERED
    print(summary.format_scores(scored, model.config))
    _say_notes(plan.questions)
    if plan.config.chip is not None:
        quantize = None if plan.quantize is None else plan.quantize.name
        bits = Bits.of(quantize, plan.config.cache_dtype)
        for entry in scored:
            print(summary.against_floor(entry, model, plan.config.chip, bits))
    problems = [problem for entry in scored for problem in entry.scores.problems]
    path = plan.workdir / "report.html"
    try:
        summary.write(path, plan, model, scored)
        print(f"report: {path}")
    # All metrics are stored: whatever goes wrong with charts and overlays costs the report alone.
    except Exception as error:
        problems.append(f"{path} was not written: {type(error).__name__}: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if failed:
        print(f"{failed} rows failed; see errors.jsonl under {plan.workdir}", file=sys.stderr)
        return SOME_FAILED
    return NOT_WRITTEN if problems else ALL_ANSWERED


def _score_answers(settings: EvalConfig, path: pathlib.Path, workdir: pathlib.Path) -> int:
    """Scores an answers file; no model."""
    if len(settings.tasks) > 1:
        raise ValueError("--config.answers scores one benchmark; config.tasks names several")
    (task,) = settings.tasks
    if task.files is None:
        raise ValueError(
            "--config.answers needs the questions that were answered: --config.questions=FILE"
        )
    if not task.benchmark.scores:
        raise ValueError("--config.answers needs the benchmark to score: --config.benchmark=NAME")
    questions = read_questions(task, with_images=False)
    answers = read_answers(path)
    metrics = questions.score(answers)
    _say_notes([questions])
    workdir.mkdir(parents=True, exist_ok=True)
    runner.write_metrics(workdir / "metrics.json", metrics)
    print(json.dumps(metrics, indent=1))
    try:
        questions.upload(answers, workdir)
    except OSError as error:
        print(f"{task.benchmark.name}: no upload file: {error}", file=sys.stderr)
        return NOT_WRITTEN
    return ALL_ANSWERED


def _say_notes(questions: Sequence[TaskQuestions]) -> None:
    for entry in questions if is_leader() else ():
        for note in entry.notes:
            print(note, flush=True)

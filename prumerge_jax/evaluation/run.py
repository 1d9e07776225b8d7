"""Several benchmarks with several reductions in one run: table, report, exit status."""

import dataclasses
import io
import json
import math
import pathlib
import re
import sys
from importlib import metadata

import jax
import ml_collections
import numpy as np

from prumerge_jax import cost, reductions, sharding
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.digits import benchmark as digits
from prumerge_jax.engine.shapes import EVALUATION_SIZES, EngineConfig
from prumerge_jax.evaluation import runner
from prumerge_jax.evaluation.answers import read_answers
from prumerge_jax.evaluation.benchmarks.registry import benchmark
from prumerge_jax.evaluation.report.bootstrap import Interval, paired_bootstrap
from prumerge_jax.evaluation.report.html import Example, Report, TokensByGroup, write_report
from prumerge_jax.evaluation.report.overlay import overlay
from prumerge_jax.evaluation.report.results import Row, format_table
from prumerge_jax.evaluation.runner import Decoding, Rows, Scored, Task
from prumerge_jax.llava import Llava

ALL_ANSWERED, SOME_FAILED = 0, 3
"""Exit statuses."""

EXAMPLES = 3
"""Images of each benchmark whose kept patches the report shows."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One benchmark with one reduction, scored.

    Attributes:
      rows: the questions.
      reduction: as it was spelled.
      scored: what came out.
    """

    rows: Rows
    reduction: str
    scored: Scored


def evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
    """Runs what a configuration of `configs/eval.py` asks for; returns the exit status.

    Writes per benchmark and reduction what `runner.run` writes, and `metrics.json`; and over all
    of them `report.html`. With one benchmark and one reduction everything lies in `workdir` itself,
    else in `workdir/BENCHMARK/REDUCTION`.

    Raises:
      ValueError: the configuration, or a file it names, is wrong; the message says where.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    tasks = [_task(values, config, workdir) for values in _task_fields(config)]
    if config.answers is not None:
        return _score_file(tasks, pathlib.Path(config.answers), workdir)
    if not config.checkpoint:
        raise ValueError(
            "no model to score: pass --config.checkpoint=DIR, or --config.answers=FILE"
        )
    names = list(reductions.parse_list(config.reduction))
    every_rows = [Rows(task) for task in tasks]
    for rows in every_rows:
        rows.check_images()
    checkpoint = model_directory(config.checkpoint)
    model = load(config, checkpoint)
    decoding = Decoding(**config.decoding)
    for name in names:
        model.image_size(name)  # one that this tower cannot provide for is refused before any runs
    is_single = len(tasks) == 1 and len(names) == 1 and not config.baselines
    weights = runner.weights_hash(checkpoint)

    entries: list[Entry] = []
    for rows in every_rows:
        queue = list(names)
        while queue:
            name = queue.pop(0)
            folder = workdir
            if not is_single:
                folder = workdir / rows.task.benchmark.name / _as_folder(name)
                folder.mkdir(parents=True, exist_ok=True)
            print(f"{rows.task.benchmark.name}, {name}", flush=True)
            scored = runner.run(model, weights, rows, reductions.parse(name), decoding, folder)
            runner.write_metrics(folder / "metrics.json", scored.metrics)
            entries.append(Entry(rows, name, scored))
            if config.baselines and name in names:
                queue = [*_baselines(name, scored, model), *queue]

    table_rows = [_row(entry, entries) for entry in entries]
    print(format_table(table_rows))
    if config.chip is not None:
        for entry in entries:
            print(_against_floor(entry, model, config.chip))
    report = Report(
        title="Visual token reduction: " + ", ".join(r.task.benchmark.name for r in every_rows),
        facts=_facts(config, model, weights),
        rows=table_rows,
        examples=_examples(every_rows, names, model, decoding),
        tokens_by_group=_tokens_by_digits(entries),
    )
    write_report(workdir / "report.html", report)
    print(f"report: {workdir / 'report.html'}")
    failed = sum(entry.scored.failed for entry in entries)
    if failed:
        print(f"{failed} rows failed; see errors.jsonl under {workdir}", file=sys.stderr)
    return SOME_FAILED if failed else ALL_ANSWERED


def load(config: ml_collections.ConfigDict, checkpoint: pathlib.Path) -> Llava:
    """The model in a directory, on the devices that a configuration names."""
    axes = dict(config.mesh)
    mesh = sharding.make_mesh(**axes) if math.prod(axes.values()) > 1 else None
    dtype = None if config.dtype is None else jax.numpy.dtype(config.dtype)
    shapes = EngineConfig(**config.engine, defaults=EVALUATION_SIZES)
    return Llava.load(checkpoint, dtype=dtype, engine=shapes, mesh=mesh)


def _task_fields(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """The benchmarks to run: `config.tasks`, or the one of the configuration's own fields."""
    if not config.tasks:
        return [config]
    return [ml_collections.ConfigDict(dict(fields)) for fields in config.tasks]


def _task(
    fields: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Task:
    chosen = benchmark(fields.benchmark)
    paths = {
        name: None if fields.get(name) is None else pathlib.Path(fields[name])
        for name in ("questions", "images", "annotations")
    }
    if paths["questions"] is None:
        if chosen.name != "digits":
            raise ValueError(f"{chosen.name} needs its question file: --config.questions=FILE")
        # The miniature's questions are drawn, not downloaded.
        folder = workdir / "digits_questions"
        digits.write_files(folder, split=config.digits.split, scenes=config.digits.scenes)
        paths = {
            "questions": folder / digits.QUESTIONS_FILE,
            "images": folder / digits.IMAGE_FOLDER,
            "annotations": folder / digits.ANNOTATIONS_FILE,
        }
    assert paths["questions"] is not None
    return Task(chosen, paths["questions"], paths["images"], paths["annotations"])


def _score_file(tasks: list[Task], answers: pathlib.Path, workdir: pathlib.Path) -> int:
    if len(tasks) > 1:
        raise ValueError("--config.answers scores one benchmark; config.tasks names several")
    metrics = runner.score_answers(tasks[0], read_answers(answers), workdir)
    runner.write_metrics(workdir / "metrics.json", dict(metrics))
    print(json.dumps(metrics, indent=1))
    return ALL_ANSWERED


def _baselines(name: str, scored: Scored, model: Llava) -> list[str]:
    """Reductions with as many tokens, but without a method: random, uniform, a smaller image."""
    baselines = reductions.equal_count_baselines(name)
    if not baselines:
        return []
    side = min(round(math.sqrt(scored.visual_tokens.mean())), model.config.vision.grid - 1)
    return [*baselines, f"downsample:{max(side, 1)}"]


def _row(entry: Entry, entries: list[Entry]) -> Row:
    chosen = entry.rows.task.benchmark
    scored = entry.scored
    full = next((e.scored for e in entries if e.rows is entry.rows and e.reduction == "full"), None)
    speed, speedup = scored.metrics["images_per_second"], None
    if full is not None and speed and full.metrics["images_per_second"]:
        speedup = speed / full.metrics["images_per_second"]
    metrics = {
        name: float("nan") if value is None else value
        for name, value in scored.metrics.items()
        if name not in runner.RUN_FIGURES and not name.startswith("standard_error_")
    }
    errors = {
        name.replace("standard_error_", "accuracy_"): float(value)
        for name, value in scored.metrics.items()
        if name.startswith("standard_error_") and value is not None
    }
    return Row(
        benchmark=chosen.name,
        reduction=entry.reduction,
        metrics=metrics,
        headline=chosen.headline,
        standard_errors=errors,
        visual_tokens=scored.visual_tokens,
        images_per_second=speed,
        speedup=speedup,
        difference=_difference(scored, full, chosen.headline),
    )


def _difference(scored: Scored, full: Scored | None, metric: str) -> Interval | None:
    """The headline less that of `full`, in percent points, where it is a mean over questions."""
    if full is None or full is scored:
        return None
    if metric not in scored.per_question or metric not in full.per_question:
        return None
    return paired_bootstrap(100 * scored.per_question[metric], 100 * full.per_question[metric])


def _against_floor(entry: Entry, model: Llava, chip: str) -> str:
    """Achieved images per second against the cost model's floor for one such chip."""
    if chip not in cost.CHIPS:
        raise ValueError(f"unknown chip {chip!r}; expected one of {sorted(cost.CHIPS)}")
    metrics = entry.scored.metrics
    workload = cost.Workload(
        visual_tokens=float(metrics["visual_tokens_mean"] or 0),
        text_tokens=float(metrics["text_tokens_mean"] or 0),
        batch=model.engine_sizes.slots,
        output_tokens=max(round(float(metrics["new_tokens_mean"] or 1)), 1),
    )
    floor = cost.images_per_second(model.config, workload, cost.CHIPS[chip])
    speed = metrics["images_per_second"]
    achieved = "not timed" if speed is None else f"{speed:.1f} images/s, {speed / floor:.1%}"
    return f"{entry.reduction}: {achieved} of the floor of one {chip}, {floor:.1f} images/s"


def _examples(
    every_rows: list[Rows], names: list[str], model: Llava, decoding: Decoding
) -> list[Example]:
    """Overlays of the first images of each benchmark, for every reduction that selects patches."""
    shown = [name for name in names if reductions.parse(name).selects_patches]
    examples = []
    for rows in every_rows:
        images = list(dict.fromkeys(q.image for q in rows.questions if isinstance(q.image, str)))
        for image in images[:EXAMPLES]:
            for name in shown:
                assert rows.task.images is not None
                mode = rows.task.benchmark.image_mode(decoding.protocol)
                try:
                    explained = model.explain(
                        rows.task.images / image, reduction=name, image_mode=mode
                    )
                except ValueError:  # a bad image is in errors.jsonl already
                    continue
                picture = io.BytesIO()
                overlay(*explained).savefig(picture, format="png", dpi=60)
                count = len(explained.patch_indices)
                caption = f"{count} of {len(explained.assignment)} patches are kept"
                title = f"{image}, {name}"
                examples.append(Example(title, picture.getvalue(), caption))
    return examples


def _tokens_by_digits(entries: list[Entry]) -> TokensByGroup | None:
    """Mean visual tokens by the number of digits in the picture, for the digits benchmark."""
    means: dict[str, dict[int, float]] = {}
    for entry in entries:
        if entry.rows.task.benchmark.name != "digits" or entry.scored.failed:
            continue
        truths: digits.Annotations = entry.rows.task.benchmark.required(entry.rows.annotations)
        numbers = np.array([len(truths[str(q.question_id)].digits) for q in entry.rows.questions])
        means[entry.reduction] = {
            int(number): float(entry.scored.visual_tokens[numbers == number].mean())
            for number in np.unique(numbers)
        }
    return TokensByGroup("number of digits", means) if means else None


def _facts(config: ml_collections.ConfigDict, model: Llava, weights: str) -> dict[str, str]:
    devices = jax.devices()
    versions = [f"{name} {metadata.version(name)}" for name in ("prumerge-jax", "jax", "flax")]
    return {
        "checkpoint": f"{pathlib.Path(config.checkpoint).name}, manifest {weights[:12]}",
        "computed in": str(model.dtype),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": ", ".join(versions),
        **{name: str(value) for name, value in config.decoding.items()},
    }


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w+.=-]", "_", name)

"""What an evaluation found: table, comparison with the floor of a chip, report."""

import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
import numpy as np

from prumerge_jax import cost
from prumerge_jax.data.images import Shown, VideoFile
from prumerge_jax.evaluation import runner
from prumerge_jax.evaluation.plan import Plan, Run
from prumerge_jax.evaluation.questions import TaskQuestions, video_file
from prumerge_jax.evaluation.report.bootstrap import Interval, paired_bootstrap
from prumerge_jax.evaluation.report.html import Example, Report, TokensByGroup, write_report
from prumerge_jax.evaluation.report.overlay import overlays
from prumerge_jax.evaluation.report.results import BASELINE, Row, format_table
from prumerge_jax.evaluation.runner import RunScores
from prumerge_jax.llava import Llava
from prumerge_jax.models.config import LlavaConfig

EXAMPLES = 3
"""Images of each benchmark whose kept patches the report shows."""

_PER_IMAGE = ("vision", "merge")
"""Components of the cost model that questions about one image share."""


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """One benchmark with one reduction, scored."""

    run: Run
    scores: RunScores


def format_scores(scored: Sequence[ScoredRun], model: LlavaConfig) -> str:
    """The tables in plain text."""
    return format_table(_rows(scored, model))


def against_floor(entry: ScoredRun, model: Llava, chip: str, bits: cost.Bits) -> str:
    """Achieved questions per second against the cost model's floor for one such chip; `bits` says
    how the model is held."""
    metrics, name = entry.scores.metrics, entry.run.name
    questions, images = metrics["questions_per_second"], metrics["images_per_second"]
    if not questions:
        return f"{name}: not timed; all answers were there"
    batch = model.engine_sizes.slots
    vision = dataclasses.replace(
        model.config.vision, image_size=model.image_size(entry.run.reduction)
    )
    sizes = dataclasses.replace(model.config, vision=vision)
    workload = cost.Workload(
        visual_tokens=float(metrics["visual_tokens_mean"] or 0),
        text_tokens=float(metrics["text_tokens_mean"] or 0),
        batch=batch,
        output_tokens=max(round(float(metrics["new_tokens_mean"] or 1)), 1),
        bits=bits,
        tower_stages=cost.stages_of(vision, entry.run.reduction),
    )
    seconds = cost.floor_seconds(sizes, workload, cost.CHIPS[chip])
    shares = dict.fromkeys(_PER_IMAGE, (images or 0) / questions)
    shares["prefill"] = float(metrics["computed_over_request_tokens"] or 1)
    floor = batch / sum(time * shares.get(component, 1) for component, time in seconds.items())
    return (
        f"{name}: {questions:.1f} questions/s about {images or 0:.1f} images/s, "
        f"{questions / floor:.1%} of the floor of one {chip}, {floor:.1f} questions/s"
    )


def write(path: pathlib.Path, plan: Plan, model: Llava, scored: Sequence[ScoredRun]) -> None:
    """Writes the report.

    Raises:
      OSError: it could not be written.
    """
    names = ", ".join(questions.task.benchmark.name for questions in plan.questions)
    report = Report(
        title=f"Visual token reduction: {names}",
        facts=_facts(plan, scored),
        rows=_rows(scored, model.config),
        examples=[
            example for questions in plan.questions for example in _examples(plan, model, questions)
        ],
        tokens_by_group=_tokens_by_group(scored),
    )
    write_report(path, report)


def _rows(scored: Sequence[ScoredRun], model: LlavaConfig) -> list[Row]:
    full = {id(entry.run.questions): entry.scores for entry in scored if entry.run.name == BASELINE}
    return [_row(entry, full.get(id(entry.run.questions)), model) for entry in scored]


def _row(entry: ScoredRun, full: RunScores | None, model: LlavaConfig) -> Row:
    benchmark, scores = entry.run.questions.task.benchmark, entry.scores
    speed, speedup = scores.metrics["questions_per_second"], None
    if full is not None and speed and full.metrics["questions_per_second"]:
        speedup = speed / full.metrics["questions_per_second"]
    metrics, errors = {}, {}
    for name, value in scores.metrics.items():
        if name.startswith("standard_error_") and value is not None:
            errors[name.replace("standard_error_", "accuracy_")] = float(value)
        elif name not in runner.RUN_FIGURES:
            metrics[name] = float("nan") if value is None else value
    if metrics:  # a part of a benchmark may lack the headline metric
        metrics.setdefault(benchmark.headline, float("nan"))
    return Row(
        benchmark=benchmark.name,
        reduction=entry.run.name,
        metrics=metrics,
        headline=benchmark.headline,
        standard_errors=errors,
        visual_tokens=scores.visual_tokens,
        images_per_second=scores.metrics["images_per_second"],
        speedup=speedup,
        difference=_difference(scores, full, benchmark.headline),
        computed_share=scores.metrics["computed_over_request_tokens"],
        layer_tokens=_layer_tokens(entry, model.text.num_layers),
    )


def _layer_tokens(entry: ScoredRun, depth: int) -> float | None:
    """Mean over layers and images of the visual tokens; None where all of them see as many."""
    drops, counts = entry.run.reduction.drops(depth), entry.scores.visual_tokens
    if drops is None or not counts.size:
        return None
    return float(np.mean([drops.layer_average(count, depth) for count in counts.tolist()]))


def _difference(scores: RunScores, full: RunScores | None, metric: str) -> Interval | None:
    """The headline less that of `full`, in percent points, where it is a mean over questions."""
    if full is None or full is scores:
        return None
    if metric not in scores.per_question or metric not in full.per_question:
        return None
    return paired_bootstrap(100 * scores.per_question[metric], 100 * full.per_question[metric])


def _examples(plan: Plan, model: Llava, questions: TaskQuestions) -> list[Example]:
    """Overlays of a benchmark's first images, for every named reduction that selects patches."""
    runs = [
        run for run in plan.runs if run.questions is questions and run.reduction.selects_patches
    ]
    first: dict[str, int] = {}
    for index, question in enumerate(questions.questions):
        if isinstance(question.image, str) and questions.refusal(index) is None:
            first.setdefault(question.image, index)
        if len(first) == EXAMPLES:
            break
    return [
        example
        for image, index in first.items()
        for run in runs
        if (example := _example(model, run, image, questions.questions[index].text)) is not None
    ]


def _example(model: Llava, run: Run, image: str, question: str) -> Example | None:
    task = run.questions.task
    assert task.images is not None  # TaskQuestions.check_images
    path = task.images / image
    shown: Shown = VideoFile(video_file(path)) if task.benchmark.shows_videos else path
    mode = runner.picture_mode(model.config, task, run.decoding)
    try:
        explained = model.explain_crops(
            shown, reduction=run.reduction, image_mode=mode, question=question
        )
    except ValueError:  # a bad image is in errors.jsonl already
        return None
    drawing = io.BytesIO()
    dots = 60 if len(explained) == 1 else 40
    overlays(explained).savefig(drawing, format="png", dpi=dots)
    kept, patches = (
        sum(len(part) for part in parts)
        for parts in zip(*((e.patch_indices, e.assignment) for e in explained), strict=True)
    )
    caption = f"{kept} of {patches} patches are kept"
    if len(explained) > 1:
        caption += f" of {len(explained)} {'frames' if task.benchmark.shows_videos else 'crops'}"
    return Example(f"{image}, {run.name}", drawing.getvalue(), caption)


def _tokens_by_group(scored: Sequence[ScoredRun]) -> TokensByGroup | None:
    """Mean visual tokens by what the first benchmark that groups its images counts."""
    label, means = None, {}
    for entry in scored:
        questions, benchmark = entry.run.questions, entry.run.questions.task.benchmark
        if benchmark.group_label is None or entry.scores.failed:
            continue
        if label not in (None, benchmark.group_label):
            continue
        label = benchmark.group_label
        groups = np.array(
            [
                benchmark.group_of(question, questions.annotations)
                for question in questions.questions
                if question.image is not None
            ]
        )
        means[entry.run.name] = {
            int(group): float(entry.scores.visual_tokens[groups == group].mean())
            for group in np.unique(groups)
        }
    return None if label is None else TokensByGroup(label, means)


def _facts(plan: Plan, scored: Sequence[ScoredRun]) -> Mapping[str, str]:
    """What it takes to judge or repeat the run."""
    devices = jax.local_devices()[:1] if plan.mesh is None else plan.mesh.devices.flatten().tolist()
    versions = [f"{name} {metadata.version(name)}" for name in ("prumerge-jax", "jax", "flax")]
    processes = f" in each of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    decodings: dict[str, dict[str, None]] = {}
    for entry in scored:
        for name, value in dataclasses.asdict(entry.run.decoding).items():
            decodings.setdefault(name, {})[str(value)] = None
    notes = [note for questions in plan.questions for note in questions.notes]
    return {
        "checkpoint": f"{plan.checkpoint.name}, weights {plan.weights[:12]}",
        "computed in": str(plan.dtype),
        "devices": f"{len(devices)} x {devices[0].device_kind}" + processes,
        "versions": ", ".join(versions),
        **{name: ", ".join(values) for name, values in decodings.items()},
        **({"notes": "; ".join(notes)} if notes else {}),
    }

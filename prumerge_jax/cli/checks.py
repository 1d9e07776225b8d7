"""The paper's open questions, each asked of a model on the digits.

python -m prumerge_jax.cli.checks --check NAME --workdir DIR [--checkpoint miniature]
    [--scenes 250] [--split validation] [--reduction "full prumerge cover:tokens=54"]

attention    which layer and which heads give the attention that decides
neighbours   merging against selection, at 5, 10, 20 and 32 neighbours
minimum      what a minimum of tokens costs, and what it brings
iterative    PruMerge applied again to its own output, at several budgets
weight       what the weight of a merged token brings, at several budgets
text         what dropping tokens of the prompt's text costs, beside as many of the image's
robustness   noise, blur, clutter and low contrast, for --reduction
adaptation   what an adapter changes: attention to the image and to its digits, before and after,
             for --checkpoint BEFORE,AFTER

Each but the last is a run of eval.py, with its table and its report of what every reduction keeps
of the first images, and a table of the token counts: mean, coefficient of variation, share of
images below 16, and how many times fewer tokens than patches. A run that was interrupted resumes.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from prumerge_jax.cli import command_line, recipes

_MERGES = " ".join(
    f"prumerge:neighbours={n},extra_token=False paper:neighbours={n},extra_token=False"
    for n in (5, 10, 20, 32)
)
REDUCTIONS: Mapping[str, str] = {
    "attention": "full select-only select-only:heads=mean select-only:layer=22 "
    "select-only:layer=22,heads=mean",
    "neighbours": f"full select-only {_MERGES}",
    "minimum": "full select-only select-only:min_tokens=8 select-only:min_tokens=16 "
    "select-only:min_tokens=32",
    "iterative": "full "
    + " ".join(
        f"prumerge-iterative:tokens={n} prumerge-iterative:tokens={n},merge=none"
        for n in (54, 27, 18)
    ),
    "weight": "full "
    + " ".join(
        f"cover:tokens={n} cover:tokens={n},merge=mean,size_bias=False cover:tokens={n},merge=mean"
        for n in (54, 27, 18)
    ),
    "text": "full "
    + " ".join(
        f"fastv:layer=1,keep={keep},of=text fastv:layer=1,keep={keep}"
        for keep in (0.9, 0.75, 0.5, 0.25)
    ),
}
"""What each check compares."""
ROBUSTNESS, ADAPTATION = "robustness", "adaptation"
BEFORE_AND_AFTER = "miniature,miniature-any-budget"
CLEAN = "clean"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    command_line.run(_main, argv)


def _flags() -> flags.FlagValues:
    values = command_line.strings(
        ("check", None, f"one of {', '.join([*REDUCTIONS, ROBUSTNESS, ADAPTATION])}"),
        ("workdir", None, "directory of the runs; new, or to be resumed"),
        (
            "checkpoint",
            None,
            "model directory; by default miniature, the shipped model; of adaptation two, "
            f"{BEFORE_AND_AFTER}",
        ),
        ("split", "validation", "validation, or test for figures to report"),
        ("reduction", "full prumerge cover:tokens=54", "what robustness compares"),
    )
    flags.DEFINE_integer("scenes", 250, "scenes to ask about", lower_bound=1, flag_values=values)
    return values


def _main(argv: Sequence[str]) -> int:
    values = _flags()
    command_line.parse(argv, values, __doc__)
    command_line.require(values, "check", "workdir")
    if values.check not in (*REDUCTIONS, ROBUSTNESS, ADAPTATION):
        raise ValueError(f"--check {values.check}: expected {values['check'].help}")
    workdir = pathlib.Path(values.workdir)
    if values.check == ADAPTATION:
        return _adaptation(values, workdir)
    if values.checkpoint is None:
        values["checkpoint"].value = "miniature"
    if values.check == ROBUSTNESS:
        return _robustness(values, workdir)
    config = _config(values, REDUCTIONS[values.check])
    config.digits.update({"split": values.split, "scenes": values.scenes})
    status = _evaluate(config, workdir)
    _print_counts(_metrics(workdir))
    return status


def _config(values: flags.FlagValues, reductions: str) -> ConfigDict:
    config = recipes.load("eval")
    config.checkpoint, config.reduction = values.checkpoint, reductions
    return config


def _evaluate(config: ConfigDict, workdir: pathlib.Path) -> int:
    # These take seconds to import; a mistyped flag is answered before.
    import prumerge_jax.digits.benchmark  # noqa: F401, registers itself
    from prumerge_jax.evaluation.run import evaluate

    return evaluate(config, workdir)


def _robustness(values: flags.FlagValues, workdir: pathlib.Path) -> int:
    """The same questions about images of each kind; returns the worst exit status."""
    from prumerge_jax.digits import benchmark, corruptions

    files = workdir / "files"
    if not (files / benchmark.QUESTIONS_FILE).exists():
        benchmark.write_files(files, split=values.split, scenes=values.scenes)
    worst, accuracies = 0, {}
    for kind in (CLEAN, *corruptions.CORRUPTIONS):
        images = files / benchmark.IMAGE_FOLDER
        if kind != CLEAN:
            images = files / kind
            corruptions.corrupt_folder(files / benchmark.IMAGE_FOLDER, images, kind)
        config = _config(values, values.reduction)
        config.benchmark, config.images = "digits", str(images)
        config.questions = str(files / benchmark.QUESTIONS_FILE)
        config.annotations = str(files / benchmark.ANNOTATIONS_FILE)
        print(f"images: {kind}", flush=True)
        worst = max(worst, _evaluate(config, workdir / kind))
        accuracies[kind] = _metrics(workdir / kind)
    _print_robustness(accuracies)
    return worst


def _adaptation(values: flags.FlagValues, workdir: pathlib.Path) -> int:
    """Attention of two models; always 0."""
    from prumerge_jax.digits import adaptation

    adaptation.compare_models(
        (values.checkpoint or BEFORE_AND_AFTER).split(","),
        values.reduction,
        split=values.split,
        scenes=values.scenes,
        output=workdir / "adaptation.json",
    )
    return 0


def _metrics(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The metrics of every run of an evaluation, by the name of its folder."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(workdir.rglob("metrics.json"))
    }


def _print_counts(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of token counts."""
    columns = ("mean", "cv", "below_16", "max")
    most = max(run["visual_tokens_max"] or 0 for run in metrics.values())
    print(f"{'tokens per image':48s}" + "".join(f"{c:>10s}" for c in (*columns, "fewer")))
    for name, run in metrics.items():
        figures = [run[f"visual_tokens_{column}"] for column in columns]
        cells = "".join(f"{'-' if f is None else f'{f:.2f}':>10s}" for f in figures)
        fewer = "-" if not figures[0] else f"{most / figures[0]:.1f}x"
        print(f"{name:48s}{cells}{fewer:>10s}")


def _print_robustness(accuracies: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Accuracy by reduction and kind of image, and what is left of that on clean ones."""
    kinds = list(accuracies)
    print(f"{'accuracy, % of clean':40s}" + "".join(f"{kind:>18s}" for kind in kinds))
    for name, run in accuracies[CLEAN].items():
        cells = []
        for kind in kinds:
            accuracy = accuracies[kind][name].get("accuracy_mean")
            clean = run.get("accuracy_mean")
            share = f" ({100 * accuracy / clean:.0f} %)" if accuracy and clean else ""
            cells.append("-" if accuracy is None else f"{accuracy:.1f}{share}")
        print(f"{name:40s}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    main()

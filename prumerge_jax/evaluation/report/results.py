"""What a scoring run found, row by row, and the tables of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation.report.bootstrap import Interval
from prumerge_jax.evaluation.report.tables import Table, to_text

TERMINAL_WIDTH = 120
BASELINE = "full"
"""The reduction that differences and speed-ups refer to."""
_ABSENT = "–"
NOTE = (
    "±: one standard error. Brackets: 95 % interval of the paired bootstrap over questions. "
    f"{_ABSENT}: not measured."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One benchmark scored with one reduction.

    Attributes:
      benchmark: its name.
      reduction: its name, as displayed.
      metrics: all metrics by name, rates in percent; NaN, or a name that other rows of the
        benchmark have and this one lacks, shows as a dash.
      headline: the metric that is plotted and shown first, the same in all rows of a benchmark.
      standard_errors: by metric name, in the metric's unit, for the metrics that have one.
      visual_tokens: int [images], tokens of every image; questions without an image left out.
      images_per_second: None where nothing was timed.
      speedup: images per second over those of `full` in the same run; None without it.
      difference: headline minus that of `full`, with its 95 % interval, in the metric's unit.
      layer_tokens: mean over the decoder's layers of the visual tokens that they see, where some
        leave in it.
      computed_share: tokens computed for prompts over tokens of the prompts, below 1 where some
        share what is in front of them; None where nothing was computed.
    """

    benchmark: str
    reduction: str
    metrics: Mapping[str, float]
    headline: str
    standard_errors: Mapping[str, float]
    visual_tokens: np.ndarray
    images_per_second: float | None
    speedup: float | None
    difference: Interval | None
    computed_share: float | None = None
    layer_tokens: float | None = None

    def __post_init__(self) -> None:
        # A benchmark that a server scores has no metrics here.
        if self.metrics and self.headline not in self.metrics:
            raise ValueError(
                f"{self.benchmark}, {self.reduction}: headline {self.headline!r} is not among the "
                f"metrics {sorted(self.metrics)}"
            )
        unknown = sorted(self.standard_errors.keys() - self.metrics.keys())
        if unknown:
            raise ValueError(
                f"{self.benchmark}, {self.reduction}: standard errors of {unknown}, which are not "
                f"among the metrics {sorted(self.metrics)}"
            )

    @property
    def score(self) -> float:
        """The headline metric, NaN where there is none."""
        return self.metrics.get(self.headline, math.nan)

    @property
    def score_error(self) -> float:
        """The standard error of the headline metric, NaN where there is none."""
        return self.standard_errors.get(self.headline, math.nan)

    @property
    def mean_tokens(self) -> float:
        """Mean visual tokens per image, NaN without images."""
        return float(np.mean(self.visual_tokens)) if self.visual_tokens.size else math.nan


def format_table(rows: Sequence[Row]) -> str:
    """The tables of the report in plain text, at most 120 columns wide (see `tables.to_text`).

    Raises:
      ValueError: rows of one benchmark have different headline metrics.
    """
    tables = [to_text(table, TERMINAL_WIDTH) for table in _tables(by_benchmark(rows))]
    return "\n\n".join([*tables, NOTE])


def by_benchmark(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each benchmark, in order.

    Raises:
      ValueError: rows of one benchmark have different headline metrics.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.benchmark, []).append(row)
    for benchmark, group in groups.items():
        headlines = {row.headline for row in group}
        if len(headlines) > 1:
            raise ValueError(
                f"rows of {benchmark} have the headline metrics {sorted(headlines)}; give all one"
            )
    return groups


def _tables(groups: Mapping[str, Sequence[Row]]) -> list[Table]:
    """An overview if there are several benchmarks, and a table for each."""
    tables = [score_table(benchmark, group) for benchmark, group in groups.items()]
    return [overview(groups), *tables] if len(groups) > 1 else tables


def overview(groups: Mapping[str, Sequence[Row]]) -> Table:
    """The headline metrics, a benchmark per column."""
    cells = {
        (benchmark, row.reduction): _score(row, row.headline)
        for benchmark, group in groups.items()
        for row in group
    }
    reductions = dict.fromkeys(reduction for _, reduction in cells)
    return Table(
        "Overview",
        [
            "reduction",
            *(f"{name} {metric_label(group[0].headline)}" for name, group in groups.items()),
        ],
        [
            [reduction, *(cells.get((name, reduction), _ABSENT) for name in groups)]
            for reduction in reductions
        ],
    )


def score_table(benchmark: str, rows: Sequence[Row]) -> Table:
    """All metrics of one benchmark, what matters most first."""
    headline = rows[0].headline
    others = dict.fromkeys(name for row in rows for name in row.metrics if name != headline)
    drops = any(row.layer_tokens is not None for row in rows)
    return Table(
        benchmark,
        [
            "reduction",
            "visual tokens mean",
            "visual tokens p95",
            *(["mean over layers"] if drops else []),
            metric_label(headline),
            f"difference to {BASELINE}",
            "images per second",
            "speed-up",
            "prompt tokens computed",
            *map(metric_label, others),
        ],
        [
            [
                row.reduction,
                format_decimal(row.mean_tokens),
                format_decimal(
                    np.percentile(row.visual_tokens, 95) if row.visual_tokens.size else None
                ),
                *([format_decimal(row.layer_tokens)] if drops else []),
                _score(row, headline),
                _interval(row.difference),
                _rate(row.images_per_second),
                _ABSENT if _is_absent(row.speedup) else f"{row.speedup:.2f}×",
                _ABSENT if _is_absent(row.computed_share) else f"{row.computed_share:.0%}",
                *(_score(row, name) for name in others),
            ]
            for row in rows
        ],
    )


def metric_label(metric: str) -> str:
    """A metric's name as displayed."""
    return metric.replace("_", " ")


def format_decimal(value: float | None) -> str:
    """One decimal, or a dash."""
    return _ABSENT if _is_absent(value) else f"{value:.1f}"


def _score(row: Row, metric: str) -> str:
    value, error = format_decimal(row.metrics.get(metric)), row.standard_errors.get(metric)
    return value if value == _ABSENT or _is_absent(error) else f"{value} ±{format_decimal(error)}"


def _interval(interval: Interval | None) -> str:
    if interval is None or any(map(_is_absent, interval)):
        return _ABSENT
    return f"{interval.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _rate(value: float | None) -> str:
    """Three significant digits, never in powers of ten."""
    if value is None or not math.isfinite(value):
        return _ABSENT
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


def _is_absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)

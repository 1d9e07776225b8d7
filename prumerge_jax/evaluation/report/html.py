"""`report.html`: what a scoring run found, with charts and overlays.

The page is one file that needs no network: styles and charts are inline, images are data URLs,
and a content security policy forbids everything else. It follows the reader's choice of light or
dark and the width of the screen.
"""

import base64
import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.report import charts
from prumerge_jax.evaluation.report.results import (
    BASELINE,
    NOTE,
    Row,
    by_benchmark,
    format_decimal,
    metric_label,
    overview,
    score_table,
)
from prumerge_jax.evaluation.report.tables import Table, to_html

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Example:
    """An image, such as the patches that were kept of an image."""

    title: str
    png: bytes
    caption: str

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG_SIGNATURE):
            raise ValueError(f"example {self.title!r} is not a PNG; it begins {self.png[:8]!r}")


@dataclasses.dataclass(frozen=True)
class TokensByGroup:
    """Mean visual tokens by something countable about the image.

    Attributes:
      label: what is counted, such as "number of digits".
      means: by reduction, then by count.
    """

    label: str
    means: Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
      title: heading of the page.
      facts: what it takes to judge or repeat the run: checkpoint, protocol, versions, hardware.
      rows: in the order of the table; benchmarks in the order of their first rows.
      examples: images, in order.
      tokens_by_group: None where images cannot be grouped.
    """

    title: str
    facts: Mapping[str, str]
    rows: Sequence[Row]
    examples: Sequence[Example]
    tokens_by_group: TokensByGroup | None


def write_report(path: pathlib.Path, report: Report) -> None:
    """Writes the page, completely or not at all.

    Raises:
      ValueError: rows of one benchmark have different headline metrics.
    """
    # A lone surrogate in a model's or a data set's text has no UTF-8: it becomes U+FFFD on screen.
    jsonfiles.replace_file(path, _page(report).encode("utf-8", "xmlcharrefreplace"))


def _page(report: Report) -> str:
    groups = by_benchmark(report.rows)
    parts = [f"<h1>{html.escape(report.title)}</h1>\n"]
    if len(groups) > 1:
        parts.append(f"<section><h2>Overview</h2>\n{to_html(overview(groups))}</section>\n")
    parts += [_benchmark_section(name, rows) for name, rows in groups.items()]
    if report.tokens_by_group is not None:
        parts.append(_groups_section(report.tokens_by_group))
    if report.examples:
        examples = "".join(map(_example, report.examples))
        parts.append(f"<section><h2>Examples</h2>\n{examples}</section>\n")
    if report.facts:
        facts = Table("The run", ["fact", "value"], [*report.facts.items()])
        parts.append(f'<section class="facts"><h2>The run</h2>\n{to_html(facts)}</section>\n')
    return _PAGE.format(
        title=html.escape(report.title), style=_STYLE + charts.STYLE, body="".join(parts)
    )


def _benchmark_section(benchmark: str, rows: Sequence[Row]) -> str:
    note = f'<p class="note">{html.escape(NOTE)}</p>\n'
    figures = _scatter(rows) + _histograms(rows)
    return (
        f"<section><h2>{html.escape(benchmark)}</h2>\n{to_html(score_table(benchmark, rows))}"
        f'{note}<div class="charts">{figures}</div>{_constant_counts(rows)}</section>\n'
    )


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>\n{content}</figure>\n"


def _scatter(rows: Sequence[Row]) -> str:
    """The headline metric against mean tokens."""
    metric = metric_label(rows[0].headline)
    points = []
    for row in rows:
        if math.isfinite(row.score) and math.isfinite(row.mean_tokens):
            error = row.score_error if math.isfinite(row.score_error) else 0.0
            points.append(charts.Point(row.reduction, row.mean_tokens, row.score, error))
    if not points:
        return ""
    baselines = [point.y for point in points if point.label == BASELINE]
    caption = f"{metric} against visual tokens"
    caption += "; bars: one standard error" if any(point.error for point in points) else ""
    caption += f"; dashed: {BASELINE}" if baselines else ""
    listed = (
        f"{point.label}: {point.y:.1f} ±{point.error:.1f} at {point.x:.1f} tokens"
        for point in points
    )
    chart = charts.scatter(
        points,
        x_label="mean visual tokens per image",
        y_label=metric,
        reference=baselines[0] if baselines else None,
        description=f"{caption}. {'; '.join(listed)}.",
    )
    return _figure(caption, chart)


def _histograms(rows: Sequence[Row]) -> str:
    """Token counts, one chart for all reductions that have the same ones."""
    alike: dict[bytes, list[Row]] = {}
    for row in rows:
        if not _has_one_count(row) and row.visual_tokens.size:
            counts = np.sort(row.visual_tokens).astype(np.int64)
            alike.setdefault(counts.tobytes(), []).append(row)
    figures = []
    for group in alike.values():
        counts = group[0].visual_tokens
        caption = f"Visual tokens per image: {', '.join(row.reduction for row in group)}"
        low, *quartiles, high = np.percentile(counts, [0, 25, 50, 75, 100])
        description = (
            f"{caption}. {counts.size} images, {low:.0f} to {high:.0f} tokens, quartiles "
            f"{', '.join(f'{quartile:.1f}' for quartile in quartiles)}."
        )
        chart = charts.histogram(
            counts, x_label="visual tokens", y_label="images", description=description
        )
        figures.append(_figure(caption, chart))
    return "".join(figures)


def _has_one_count(row: Row) -> bool:
    return row.visual_tokens.size > 0 and row.visual_tokens.min() == row.visual_tokens.max()


def _constant_counts(rows: Sequence[Row]) -> str:
    """A sentence on the reductions whose histogram would be a single bar."""
    named = [f"{row.reduction} {row.visual_tokens[0]}" for row in rows if _has_one_count(row)]
    if not named:
        return ""
    return f"<p>Visual tokens, the same for every image: {html.escape(', '.join(named))}.</p>\n"


def _groups_section(groups: TokensByGroup) -> str:
    """Line chart and table."""
    title = f"Visual tokens by {groups.label}"
    columns = sorted({group for means in groups.means.values() for group in means})
    table = Table(
        title,
        ["reduction", *map(str, columns)],
        [
            [reduction, *(format_decimal(means.get(column)) for column in columns)]
            for reduction, means in groups.means.items()
        ],
    )
    series = []
    for reduction, means in groups.means.items():
        finite = sorted((group, mean) for group, mean in means.items() if math.isfinite(mean))
        if finite:
            series.append(charts.Series(reduction, *zip(*finite, strict=True)))
    chart = ""
    if series:
        chart = charts.lines(
            series,
            x_label=groups.label,
            y_label="mean visual tokens",
            description=f"{title}. The figures are in the table that follows.",
        )
    return (
        f"<section><h2>{html.escape(title)}</h2>\n"
        f'<div class="charts"><figure>{chart}</figure>{to_html(table)}</div></section>\n'
    )


def _example(example: Example) -> str:
    title, caption = html.escape(example.title), html.escape(example.caption)
    data = base64.b64encode(example.png).decode()
    return (
        f'<figure class="example"><h3>{title}</h3>\n'
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">'
        f'<img alt="{title}" src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}</main></body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --muted: #57606a; --grid: #d8dee4; --shade: #dde2e8;
  --accent: #0a5fb4;
  --series-0: #0a5fb4; --series-1: #b8400a; --series-2: #0b7a5b;
  --series-3: #8a3ea8; --series-4: #806000; --series-5: #b3265e;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --ink: #e6e8ea; --muted: #a2abb4; --grid: #2f353b; --shade: #3b434b;
  --accent: #6cb2f7;
  --series-0: #6cb2f7; --series-1: #ff9a5c; --series-2: #4fd0a5;
  --series-3: #cf9bea; --series-4: #e0bf4d; --series-5: #ff8db5;
} }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
main { max-width: 78rem; margin: 0 auto; padding: 12px; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
figure { margin: 0; }
figcaption, .note { color: var(--muted); font-size: .875rem; white-space: pre-line; }
.hidden { position: absolute; clip-path: inset(50%); }
.scroll {
  overflow-x: auto;
  /* A shade at the right edge, covered when scrolled to the end: there is more. */
  background:
    linear-gradient(to left, var(--page) 50%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll;
}
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .375rem .4rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { overflow-wrap: break-word; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--grid); }
th:first-child {
  position: sticky; left: 0; background: var(--page); text-align: left;
  min-width: clamp(6.4rem, 12vw, 9rem); overflow-wrap: anywhere;
}
.facts th, .facts td { text-align: left; white-space: normal; }
.charts {
  display: grid; gap: 1.5rem; margin: 1rem 0; align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
.charts svg { display: block; width: 100%; max-width: 27rem; }
.example img { display: block; height: clamp(16rem, 30vw, 24rem); }
"""

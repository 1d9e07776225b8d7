"""The report page and the terminal's table."""

import base64
import dataclasses
import html.parser
import io
import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prumerge_jax.evaluation.report import charts
from prumerge_jax.evaluation.report.bootstrap import Interval
from prumerge_jax.evaluation.report.html import Example, Report, TokensByGroup, write_report
from prumerge_jax.evaluation.report.results import TERMINAL_WIDTH, Row, format_table

HOSTILE = "<script>alert('1')</script> & \"</title></style>\" \ud800 <img src=http://x.example/a>"
VOID = {"meta", "link", "img"}
ROW = Row(
    benchmark="digits",
    reduction="full",
    metrics={"accuracy_read": 84.61, "accuracy_mean": 73.23},
    headline="accuracy_mean",
    standard_errors={"accuracy_read": 1.14, "accuracy_mean": 0.76},
    visual_tokens=np.full(50, 144),
    images_per_second=871.4,
    speedup=1.0,
    difference=None,
)
REDUCED = dataclasses.replace(
    ROW,
    reduction="prumerge",
    metrics={"accuracy_read": 61.12, "accuracy_mean": 47.73},
    visual_tokens=np.arange(10, 60),
    images_per_second=2102.7,
    speedup=2.413,
    difference=Interval(-25.52, -26.74, -24.03),
    computed_share=0.171,
)
FULL_CELLS = ["144.0", "144.0", "73.2 ±0.8", "–", "871", "1.00×", "–", "84.6 ±1.1"]
DIFFERENCE = "-25.5 [-26.7, -24.0]"
REDUCED_CELLS = ["34.5", "56.5", "47.7 ±0.8", DIFFERENCE, "2103", "2.41×", "17%", "61.1 ±1.1"]
CELLS = {"full": FULL_CELLS, "prumerge": REDUCED_CELLS}


def _png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(data, "PNG")
    return data.getvalue()


class Page(html.parser.HTMLParser):
    """Collects elements, text and table cells; fails on tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _report(**changes) -> Report:
    report = Report(
        title="Digits",
        facts={"checkpoint": "abc123", "hardware": "2 cores"},
        rows=[ROW, REDUCED],
        examples=[Example("scene 1", _png(), "kept 24 of 144")],
        tokens_by_group=TokensByGroup(
            "number of digits", {"full": {1: 144.0, 2: 144.0}, "prumerge": {2: 31.25, 1: 16.04}}
        ),
    )
    return dataclasses.replace(report, **changes)


def _written(folder: pathlib.Path, report: Report) -> Page:
    write_report(folder / "report.html", report)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_holds_every_figure_in_its_place(tmp_path) -> None:
    page = _written(tmp_path, _report())
    scores, by_group, facts = page.tables
    assert {name: cells for name, *cells in scores[1:]} == CELLS
    assert scores[0][3] == "accuracy mean"
    assert scores[0][7:] == ["prompt tokens computed", "accuracy read"]
    assert by_group[0] == ["reduction", "1", "2"]
    assert by_group[1:] == [["full", "144.0", "144.0"], ["prumerge", "16.0", "31.2"]]
    assert facts[1:] == [["checkpoint", "abc123"], ["hardware", "2 cores"]]
    assert "the same for every image: full 144." in page.text
    [image] = page.named("img")
    assert image["alt"] == "scene 1"
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == _png()
    assert "kept 24 of 144" in page.text
    descriptions = [svg["aria-label"] for svg in page.named("svg")]
    assert "full: 73.2 ±0.8 at 144.0 tokens; prumerge: 47.7 ±0.8 at 34.5 tokens" in descriptions[0]
    assert "50 images, 10 to 59 tokens, quartiles 22.2, 34.5, 46.8" in descriptions[1]


def test_the_terminal_table_has_the_same_cells() -> None:
    text = format_table([ROW, REDUCED])
    cells = {
        line.split()[0]: re.split(r"  +", line)[1:]
        for line in text.splitlines()
        if line.startswith(("full", "prumerge"))
    }
    assert cells == CELLS


def test_a_wide_table_goes_on_below_and_loses_no_cell() -> None:
    metrics = {f"score_subtask_{i}": 100.25 + i for i in range(40)}
    changes = {"metrics": metrics, "headline": "score_subtask_0", "standard_errors": {}}
    rows = [dataclasses.replace(row, **changes) for row in (ROW, REDUCED)]
    lines = format_table(rows).splitlines()
    assert max(map(len, lines)) <= TERMINAL_WIDTH
    values = [cell for line in lines if line.startswith("prumerge") for cell in line.split()]
    assert [value for value in values if value in {f"{v:.1f}" for v in metrics.values()}] == [
        f"{value:.1f}" for value in metrics.values()
    ]


def test_several_benchmarks_have_an_overview(tmp_path) -> None:
    other = dataclasses.replace(
        ROW, benchmark="pope", metrics={"f1": 85.93}, headline="f1", standard_errors={}
    )
    overview, *_ = _written(tmp_path, _report(rows=[ROW, REDUCED, other])).tables
    assert overview == [
        ["reduction", "digits accuracy mean", "pope f1"],
        ["full", "73.2 ±0.8", "85.9"],
        ["prumerge", "47.7 ±0.8", "–"],
    ]
    assert format_table([ROW, REDUCED, other]).startswith("Overview\n")


def test_hostile_text_stays_text(tmp_path) -> None:
    row = dataclasses.replace(
        REDUCED,
        benchmark=HOSTILE,
        reduction=HOSTILE,
        metrics={HOSTILE: 50.0},
        headline=HOSTILE,
        standard_errors={HOSTILE: 1.0},
    )
    page = _written(
        tmp_path,
        _report(
            title=HOSTILE,
            facts={HOSTILE: HOSTILE},
            rows=[row, dataclasses.replace(row, visual_tokens=np.full(3, 7))],
            examples=[Example(HOSTILE, _png(), HOSTILE)],
            tokens_by_group=TokensByGroup(HOSTILE, {HOSTILE: {1: 2.0}}),
        ),
    )
    assert not page.named("script")
    assert len(page.named("img")) == 1
    shown = HOSTILE.replace("\ud800", "\ufffd")
    assert page.tables[0][1][0] == shown
    assert page.tables[-1][1] == [shown, shown]
    assert page.text.count("<script>") > 10


def test_the_page_asks_the_network_for_nothing(tmp_path) -> None:
    page = _written(tmp_path, _report())
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "style", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    policies = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"accuracy_mean": math.nan}, "standard_errors": {}},
        {"standard_errors": {"accuracy_mean": math.nan}, "visual_tokens": np.zeros(0, int)},
        {"metrics": {}, "standard_errors": {}},
        {"images_per_second": None, "speedup": None},
        {"images_per_second": 0.0, "speedup": math.inf, "difference": Interval(0.0, math.nan, 1.0)},
        {"metrics": {"accuracy_mean": 0.0}, "standard_errors": {"accuracy_mean": 0.0}},
        {"visual_tokens": np.zeros(2, int)},
        {"visual_tokens": np.array([3, 4])},
    ],
)
def test_extremes_leave_dashes_and_no_nan(tmp_path, changes) -> None:
    row = dataclasses.replace(ROW, **changes)
    groups = TokensByGroup("digits", {"full": {}, "prumerge": {3: math.nan}})
    page = _written(tmp_path, _report(rows=[row], examples=[], facts={}, tokens_by_group=groups))
    drawn = [value for _, attributes in page.elements for value in attributes.values() if value]
    for text in (page.text, *drawn, format_table([row])):
        assert not re.search(r"\b(nan|inf|None)\b", text)
    [cells] = page.tables[0][1:]
    score, error = row.score, row.score_error
    shown = f"{score:.1f}" + (f" ±{error:.1f}" if math.isfinite(error) else "")
    assert cells[3] == (shown if math.isfinite(score) else "–")
    assert (cells[1] == "–") == (row.visual_tokens.size == 0)
    has_point = math.isfinite(score) and row.visual_tokens.size > 0
    has_spread = len(set(row.visual_tokens.tolist())) > 1
    assert len(page.named("svg")) == has_point + has_spread


def test_reductions_with_the_same_counts_share_a_histogram(tmp_path) -> None:
    twin = dataclasses.replace(REDUCED, reduction="random", visual_tokens=np.arange(10, 60)[::-1])
    page = _written(tmp_path, _report(rows=[ROW, REDUCED, twin], tokens_by_group=None))
    assert "Visual tokens per image: prumerge, random" in page.text
    assert len(page.named("svg")) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(ROW, headline="f1"), "headline 'f1'"),
        (lambda: dataclasses.replace(ROW, standard_errors={"f1": 1.0}), "standard errors of"),
        (lambda: Example("scene", b"GIF89a", ""), "'scene' is not a PNG"),
        (
            lambda: format_table([ROW, dataclasses.replace(ROW, headline="accuracy_read")]),
            "rows of digits",
        ),
    ],
)
def test_contradictory_input_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.lists(st.integers(0, 4000), min_size=2, max_size=60, unique=True))
def test_histogram_bars_count_every_value_once(values) -> None:
    svg = charts.histogram(np.array(values), x_label="x", y_label="y", description="d")
    bars = re.findall(r"<title>(\d+)(?: to (\d+))?: (\d+)</title>", svg)
    assert 2 <= len(bars) <= 24
    for first, last, count in bars:
        covered = range(int(first), int(last or first) + 1)
        assert int(count) == sum(value in covered for value in values)
    assert sum(int(count) for *_, count in bars) == len(values)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 600), st.floats(0, 100), st.floats(0, 5)), min_size=1, max_size=8
    )
)
def test_scatter_labels_are_all_there_apart_and_inside(values) -> None:
    points = [charts.Point(f"method {i}", *value) for i, value in enumerate(values)]
    svg = charts.scatter(points, x_label="x", y_label="y", reference=None, description="d")
    labels = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)">(.*?)</text>', svg)
    assert sorted(text for *_, text in labels) == sorted(point.label for point in points)
    _, _, width, height = map(float, re.search(r'viewBox="(.*?)"', svg).group(1).split())
    corners = [(float(x), float(y)) for x, y, _ in labels]
    extent = 6 * len("method 0")
    for i, (x, y) in enumerate(corners):
        assert 0 <= x <= width - extent
        assert 12 <= y <= height
        assert all(abs(x - u) >= extent or abs(y - v) >= 12.5 for u, v in corners[:i])

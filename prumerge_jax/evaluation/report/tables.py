"""Tables of ready-made text, printed to a terminal or written as HTML."""

import dataclasses
import html
import re
import textwrap
from collections.abc import Sequence

_GAP = "  "


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first column names the row.

    Attributes:
      caption: what the table shows.
      header: [columns] column names.
      rows: [rows][columns] cells, as displayed.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def to_text(table: Table, width: int) -> str:
    """The table in plain text, its caption on a separate line.

    Columns that do not fit into `width` characters continue below, the row names repeated; nothing
    is cut, so only a row name and one cell that together are longer than `width` exceed it.
    """
    columns = [_column(cells) for cells in zip(table.header, *table.rows, strict=True)]
    names, blocks = columns[0], [columns[:1]]
    for column in columns[1:]:
        line = _GAP.join(cells[-1] for cells in [*blocks[-1], column])
        if len(blocks[-1]) > 1 and len(line) > width:
            blocks.append([names])
        blocks[-1].append(column)
    return "\n\n".join([table.caption, *map(_block, blocks)])


def _column(cells: Sequence[str]) -> list[str]:
    """Header lines, a rule and the cells of one column, padded to equal length."""
    header, *values = cells
    parts = re.findall(r"[^\s-]+-?", header)  # where textwrap may break
    width = max(map(len, [*parts, *values]), default=0)
    lines = textwrap.wrap(header, max(width, 1))
    return [text.rjust(width) for text in (*lines, "-" * width, *values)]


def _block(columns: Sequence[Sequence[str]]) -> str:
    """Columns side by side, bottom lines level; the first one, the row names, flush left."""
    height = max(map(len, columns))
    level = [[" " * len(column[-1])] * (height - len(column)) + [*column] for column in columns]
    level[0] = [text.strip().ljust(len(text)) for text in level[0]]
    return "\n".join(_GAP.join(line).rstrip() for line in zip(*level, strict=True))


def to_html(table: Table) -> str:
    """A table element in a region that scrolls sideways, by keyboard too, where it is too wide.

    The style sheet may hide the caption from sight (class `hidden`): screen readers announce it.
    """
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for name, *cells in table.rows
    )
    caption = html.escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>\n'
        f'<caption class="hidden">{caption}</caption>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )

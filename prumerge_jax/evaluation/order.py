"""The order in which questions are answered: those about one image together.

Answers are written in the order of the file, whatever this is.
"""

from collections.abc import Iterable, Sequence

from prumerge_jax.evaluation.benchmarks.base import Question

STRETCH = 4096
"""Questions that change places with each other; so many answers may be missing in front of one that
is there, when a run is killed."""


def by_image(rows: Iterable[int], questions: Sequence[Question]) -> list[int]:
    """Rows of questions, within each `STRETCH` of them by the first row that asks about the image.

    Rows without an image keep their place among these.
    """
    remaining = list(rows)
    ordered: list[int] = []
    for start in range(0, len(remaining), STRETCH):
        first: dict[str | bytes, int] = {}
        stretch = remaining[start : start + STRETCH]
        place = {}
        for row in stretch:
            image = questions[row].image
            place[row] = row if image is None else first.setdefault(image, row)
        ordered += sorted(stretch, key=place.__getitem__)
    return ordered

"""A run's rows in shares, one per process, each with a journal of its own.

Process 0, or the only one, writes `journal.jsonl`, process i `journal.i.jsonl`, and nobody writes
into another's. A run includes whatever journals are in its folder and shares out the rows that none
of them answers, so it resumes with any number of processes.
"""

import pathlib
import re
import zlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from prumerge_jax.evaluation.answers import Fingerprint
from prumerge_jax.evaluation.journal import Journal, RowOutcome, read_outcomes
from prumerge_jax.sharding.agreement import gather, together

_NAME = re.compile(r"journal(?:\.([1-9]\d{0,8}))?\.jsonl")


def journal_path(folder: pathlib.Path, process: int) -> pathlib.Path:
    """The journal that a process writes."""
    return folder / (f"journal.{process}.jsonl" if process else "journal.jsonl")


def journals(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """The journals that there are, by the process that writes them, ascending."""
    if not folder.is_dir():
        return {}
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    numbered = {int(name[1] or 0): path for path, name in found.items() if name}
    return dict(sorted(numbered.items()))


@contextmanager
def open_journal(
    folder: pathlib.Path, fingerprint: Fingerprint, num_rows: int
) -> Iterator[Journal]:
    """This process's journal, which includes what those of the others hold.

    Arguments and errors as for `Journal`; an error in one process is one in all.

    Raises:
      ValueError: also if the processes do not see each other's files.
    """
    path = journal_path(folder, jax.process_index())
    journal = together(lambda: Journal(path, fingerprint, num_rows))
    with journal:
        for outcomes in together(lambda: _others(folder, fingerprint, num_rows)):
            journal.include(outcomes)
        yield journal


def collect(
    journal: Journal,
    folder: pathlib.Path,
    fingerprint: Fingerprint,
    num_rows: int,
    shares: Sequence[Sequence[int]],
) -> None:
    """Includes in a journal what the other processes answered; all must be done.

    Args:
      journal: this process's.
      folder, fingerprint, num_rows: as for `open_journal`.
      shares: the rows that each process answered.

    Raises:
      ValueError: a journal lacks a row that its process answered.
    """
    for process, rows in enumerate(shares):
        if process == jax.process_index() or not rows:
            continue
        path = journal_path(folder, process)
        found = read_outcomes(path, fingerprint, num_rows, is_idle=False)
        if missing := [index for index in rows if index not in found]:
            raise ValueError(
                f"{path} lacks {len(missing)} rows that process {process} answered, the first is "
                f"row {missing[0] + 1}; the same command answers them again"
            )
        journal.include({index: found[index] for index in rows})


def share_out(rows: Sequence[int], images: Sequence[Hashable], processes: int) -> list[list[int]]:
    """Shares of the rows, one per process, as equal as whole images allow.

    All rows about one image are in one share: it is encoded once, and its prefix computed once.
    Images are taken in the order of their first row, so that a share is one piece of a file that
    keeps an image's rows together.

    Args:
      rows: indices of rows, ascending.
      images: what tells the image of each row; None is none, and no group.
      processes: number of shares.

    Returns:
      One ascending list of rows per process; some are empty where there are few images. None is
      larger than the mean by more than the rows of the largest image.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, image in zip(rows, images, strict=True):
        groups.setdefault((row,) if image is None else ("image", image), []).append(row)
    sizes = np.array([len(group) for group in groups.values()], np.int64)
    # Twice the middle of a group, counted in rows: its share is the one that this falls into.
    middles = 2 * np.cumsum(sizes) - sizes
    of_group = middles * processes // max(2 * len(rows), 1)
    shares: list[list[int]] = [[] for _ in range(processes)]
    for group, share in zip(groups.values(), of_group, strict=True):
        shares[share] += group
    return [sorted(share) for share in shares]


def check_agreed(rows: Sequence[int], folder: pathlib.Path) -> None:
    """Checks that all processes found the same rows unanswered.

    Raises:
      ValueError: they did not.
    """
    checksum = zlib.crc32(np.array(rows, np.int64).tobytes())
    seen = gather([len(rows), checksum])
    if any(other != seen[0] for other in seen):
        raise ValueError(
            f"{_not_shared(folder)}: they find {[count for count, _ in seen]} rows without an "
            "answer there"
        )


def _others(
    folder: pathlib.Path, fingerprint: Fingerprint, num_rows: int
) -> list[dict[int, RowOutcome]]:
    """What the journals hold that this process does not write."""
    found = journals(folder)
    for process in range(jax.process_count()):
        if process not in found:
            raise ValueError(
                f"{_not_shared(folder)}: process {jax.process_index()} does not see there what "
                f"process {process} writes"
            )
    return [
        read_outcomes(path, fingerprint, num_rows, is_idle=process >= jax.process_count())
        for process, path in found.items()
        if process != jax.process_index()
    ]


def _not_shared(folder: pathlib.Path) -> str:
    return (
        f"the processes do not see the same files in {folder}; give all of them one --workdir on "
        "a file system that they share"
    )

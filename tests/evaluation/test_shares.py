"""Rows in shares and journals of several processes: the files of one process, whatever happened."""

import itertools
import pathlib
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prumerge_jax.evaluation import shares
from prumerge_jax.evaluation.journal import Journal, RowOutcome, read_outcomes
from tests.evaluation import scoring_process
from tests.evaluation.scoring_process import FINGERPRINT, outcome
from tests.threads import Processes, processes  # noqa: F401, a fixture

ROWS = 16
IMAGES = [index // 3 for index in range(ROWS)]


class Killed(Exception):
    """The end of a process."""


def score(
    folder: pathlib.Path, index: int, count: int, lives: Sequence[int], merges: bool = True
) -> list[int]:
    """Scores a share as `runner.answer` does, and dies after some rows, or before it merges."""
    with shares.open_journal(folder, FINGERPRINT, ROWS) as journal:
        todo = journal.unanswered
        shared = shares.share_out(todo, [IMAGES[row] for row in todo], count)
        shares.check_agreed(todo, folder)
        for number, row in enumerate(shared[index]):
            if number == lives[index]:
                raise Killed
            journal.append([outcome(row)])
        shares.gather([])
        shares.collect(journal, folder, FINGERPRINT, ROWS, shared)
        if index == 0:
            if not merges:
                raise Killed
            journal.write_results(folder)
    return shared[index]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """The complete lines of each journal."""
    return {
        path.name: path.read_bytes().rpartition(b"\n")[0] + b"\n"
        for path in shares.journals(folder).values()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("straight")
    scoring_process.score(folder, ROWS)
    return folder


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_runs_and_kills_end_with_the_files_of_one_process(
    processes: Processes,  # noqa: F811
    straight: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    for _ in range(data.draw(st.integers(0, 3), "runs that are killed")):
        count = data.draw(st.integers(1, 4), "processes")
        lives = data.draw(st.lists(st.integers(0, ROWS), min_size=count, max_size=count))
        before = contents(folder)
        processes.run(count, lambda i, n=count, k=lives: score(folder, i, n, k, merges=False))
        after = contents(folder)
        assert all(after[name].startswith(content) for name, content in before.items())
        if torn := data.draw(st.sampled_from([None, *after]), "journal that is torn"):
            with (folder / torn).open("ab") as file:
                file.write(b'{"index": 3, "quest')
    count = data.draw(st.integers(1, 4), "processes at the end")
    ends = processes.run(count, lambda i: score(folder, i, count, count * [ROWS]))
    assert all(isinstance(end, list) for end in ends), ends
    for name in ("answers.jsonl", "errors.jsonl"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    answered = Counter(
        row
        for path in shares.journals(folder).values()
        for row, found in read_outcomes(path, FINGERPRINT, ROWS, is_idle=True).items()
        if found.answer is not None
    )
    assert set(answered.values()) == {1}


@given(
    images=st.lists(st.none() | st.integers(0, 12) | st.binary(max_size=2), max_size=60),
    count=st.integers(1, 9),
)
def test_shares_are_pieces_of_whole_images_and_nearly_equal(
    images: list[int | bytes | None], count: int
) -> None:
    rows = list(range(3, 3 + 2 * len(images), 2))
    shared = shares.share_out(rows, images, count)
    assert len(shared) == count
    assert sorted(itertools.chain(*shared)) == rows
    assert all(share == sorted(share) for share in shared)
    image_of = dict(zip(rows, images, strict=True))
    owner = {row: number for number, share in enumerate(shared) for row in share}
    owners: dict[object, set[int]] = {}
    for row, image in image_of.items():
        owners.setdefault(("row", row) if image is None else image, set()).add(owner[row])
    assert all(len(found) == 1 for found in owners.values())
    # In the order of their first row, images go to ascending shares.
    assert [min(found) for found in owners.values()] == sorted(min(f) for f in owners.values())
    largest = max(Counter(image for image in images if image is not None).values(), default=1)
    assert all(abs(len(share) - len(rows) / count) <= max(largest, 1) for share in shared)


def test_rows_of_one_size_are_shared_evenly() -> None:
    assert shares.share_out(range(6), [None] * 6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert shares.share_out(range(6), [0, 0, 0, 1, 1, 1], 2) == [[0, 1, 2], [3, 4, 5]]
    assert shares.share_out(range(4), [0, 1, 0, 1], 2) == [[0, 2], [1, 3]]
    assert shares.share_out([], [], 2) == [[], []]


def test_only_journals_are_taken_for_journals(tmp_path: pathlib.Path) -> None:
    names = ["journal.jsonl", "journal.2.jsonl", "journal.10.jsonl"]
    for name in [*names, "journal.0.jsonl", "journal.x.jsonl", "journal.1.jsonl.bak"]:
        (tmp_path / name).touch()
    assert {n: path.name for n, path in shares.journals(tmp_path).items()} == dict(
        zip([0, 2, 10], names, strict=True)
    )
    assert shares.journals(tmp_path / "missing") == {}


def test_a_later_success_counts_more_than_an_earlier_failure(
    processes: Processes,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    with Journal(tmp_path / "journal.jsonl", FINGERPRINT, ROWS) as journal:
        journal.append([RowOutcome(row, f"q{row}", error="no image yet") for row in range(ROWS)])
    ends = processes.run(2, lambda index: score(tmp_path, index, 2, [ROWS, ROWS]))
    assert sum(map(len, ends)) == ROWS
    errors = (tmp_path / "errors.jsonl").read_text()
    assert "no image yet" not in errors
    assert errors.count("\n") == 2


def test_a_workdir_that_is_not_shared_is_refused(
    processes: Processes,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    ends = processes.run(2, lambda index: score(folders[index], index, 2, [ROWS, ROWS]))
    for end in ends:
        assert "do not see the same files in" in str(end)
        assert "one --workdir on a file system that they share" in str(end)


def test_a_run_beside_another_is_refused_by_all_its_processes(
    processes: Processes,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    with Journal(tmp_path / "journal.1.jsonl", FINGERPRINT, ROWS):
        for count in (1, 3):
            ends = processes.run(count, lambda i, n=count: score(tmp_path, i, n, n * [ROWS]))
            for end in ends:
                assert "journal.1.jsonl is being written by another run" in str(end)


def test_a_row_that_got_lost_is_named(
    processes: Processes,  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append = Journal.append

    def lose(journal: Journal, outcomes: Sequence[RowOutcome]) -> None:
        append(journal, [o for o in outcomes if o.index != ROWS - 1])

    monkeypatch.setattr(Journal, "append", lose)
    ends = processes.run(2, lambda index: score(tmp_path, index, 2, [ROWS, ROWS]))
    assert f"lacks 1 rows that process 1 answered, the first is row {ROWS}" in str(ends[0])

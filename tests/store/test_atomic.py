"""Atomic writes: the old file or the new one, and no leftovers."""

import os
import pathlib

import pytest

from prumerge_jax.store.atomic import write_atomically


def test_a_file_is_created_and_replaced(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"one", b"", b"three" * 1000):
        write_atomically(file, content)
        assert file.read_bytes() == content
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"old")
    if failing == "fsync":

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        content: object = b"new"
    else:
        content = "no bytes"
    with pytest.raises((OSError, TypeError)):
        write_atomically(file, content)  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_leftover_of_a_killed_writer_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.incomplete").write_bytes(b"torn")
    write_atomically(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        write_atomically(tmp_path / "missing" / "a", b"new")

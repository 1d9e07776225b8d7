"""Pushing to the hub, with a stand-in for it: what is uploaded, and what is refused before."""

import pathlib
import types

import pytest

from prumerge_jax.conversion import download as downloads
from prumerge_jax.conversion import hub
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.llava import Llava
from prumerge_jax.store.errors import DirectoryError
from tests.tiny_llava import write_tiny_llava


class Hub:
    """Keeps what is sent to it."""

    def __init__(self, *, has_card: bool = False, error: str | None = None) -> None:
        self.has_card, self.error = has_card, error
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repository: str, **options: object) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(("create", {"repo_id": repository, **options}))

    def file_exists(self, repository: str, path: str) -> bool:
        return self.has_card

    def upload_file(self, **options: object) -> None:
        self.calls.append(("file", options))

    def upload_folder(self, **options: object) -> types.SimpleNamespace:
        self.calls.append(("folder", options))
        return types.SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_llava(tmp_path_factory.mktemp("hub") / "tiny")


def test_directory_and_card_are_uploaded_to_a_private_repository(folder: pathlib.Path) -> None:
    api = Hub()
    assert hub.push(folder, "someone/tiny", api) == "https://hub/commit/1"
    (_, created), (_, card), (_, uploaded) = api.calls
    assert created == {"repo_id": "someone/tiny", "private": True, "exist_ok": True}
    assert uploaded["folder_path"] == folder
    text = card["path_or_fileobj"].decode()
    assert card["path_in_repo"] == "README.md"
    assert "# tiny\n" in text
    assert "2 layers of width 48, 512 tokens" in text
    assert 'Llava.load("someone/tiny", revision="COMMIT")' in text
    assert "{" not in text


def test_a_card_that_is_there_is_kept(folder: pathlib.Path) -> None:
    api = Hub(has_card=True)
    hub.push(folder, "someone/tiny", api)
    assert [name for name, _ in api.calls] == ["create", "folder"]


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../b", "a/", "a b/c", ""])
def test_names_that_are_none(folder: pathlib.Path, name: str) -> None:
    api = Hub()
    with pytest.raises(ConversionError, match="expected USER/NAME"):
        hub.push(folder, name, api)
    assert not api.calls


def test_what_is_not_complete_or_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    api = Hub()
    with pytest.raises(DirectoryError):
        hub.push(tmp_path, "someone/tiny", api)
    assert not api.calls
    with pytest.raises(ConversionError, match="cannot push to 'someone/tiny': no token"):
        hub.push(folder, "someone/tiny", Hub(error="no token\nmore"))


def test_a_hub_id_is_loaded_only_where_a_commit_asks_for_it(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        downloads, "snapshot", lambda *arguments: (asked.append(arguments), folder)[1]
    )
    with pytest.raises(DirectoryError):
        Llava.load("someone/tiny")
    assert not asked
    commit = "0" * 40
    assert Llava.load("someone/tiny", revision=commit).config.text.width == 48
    assert asked == [("someone/tiny", commit, None)]
    with pytest.raises(ConversionError, match="40 hexadecimal digits, not 'main'"):
        Llava.load("someone/tiny", revision="main")


def test_the_program_pushes_and_takes_no_output(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from prumerge_jax.cli import convert

    pushed = []
    monkeypatch.setattr(hub, "push", lambda *arguments: (pushed.append(arguments), "URL")[1])
    with pytest.raises(SystemExit) as ended:
        convert.main(["convert_weights.py", f"--input={folder}", "--push=someone/tiny"])
    assert not ended.value.code
    assert pushed == [(folder, "someone/tiny")]
    assert "URL" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        convert.main(["convert_weights.py", "--push=a/b", "--input=x", "--output=y"])
    assert "--push takes --input alone" in str(ended.value.code)

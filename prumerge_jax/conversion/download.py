"""Fetches a checkpoint from the Hugging Face hub, only when asked to, at a pinned commit."""

import pathlib
import re

from prumerge_jax.conversion.tensor_files import ConversionError

_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"]


def download(repository: str, revision: str) -> pathlib.Path:
    """The local directory of a hub repository, from the hub's cache where it is there already.

    With HF_HUB_OFFLINE=1 only the cache is used.

    Args:
      repository: `organisation/name`.
      revision: a full commit id, so that the files of that name cannot change.

    Raises:
      ConversionError: the revision is not a commit id, or the files are not available.
    """
    return snapshot(check_commit(repository, revision), revision, _FILES)


def check_commit(repository: str, revision: str) -> str:
    """The repository, if the revision is a commit id.

    Raises:
      ConversionError: it is another word, whose files may change.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ConversionError(
            f"--download needs --revision=COMMIT, 40 hexadecimal digits, not {revision!r:.80}"
        )
    return repository


def snapshot(repository: str, revision: str, files: list[str] | None) -> pathlib.Path:
    """The local directory of a commit; `files` are patterns of those to fetch, None fetches all.

    Raises:
      ConversionError: the files are not available.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=files
        )
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"cannot download {repository[:80]}@{revision}: {reason[:200]}"
        ) from error
    return pathlib.Path(folder)

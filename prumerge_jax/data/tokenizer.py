"""Text to token ids and back: what every tokenizer can do, and which one a model has."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from prumerge_jax.data.bpe_tokenizer import BpeTokenizer
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer, Style
from prumerge_jax.data.templates import Part

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"
_INCOMPLETE = "\ufffd"
"""What bytes decode to that are not, or not yet, a complete character."""


class Tokenizer(Protocol):
    """Ids of texts and prompts, and texts of ids.

    Attributes:
      style: how control tokens inside markup are read; part of a run's identity.
    """

    style: str

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence; None where prompts begin without one."""

    @property
    def pad_id(self) -> int:
        """What pads a sequence; no valid position reads it."""

    @property
    def vocab_size(self) -> int:
        """Ids are below; an embedding table may be padded beyond."""

    def sha256(self) -> str:
        """Hash of the file, which together with `style` decides every id."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text, without BOS; what looks like a control token is characters.

        Raises:
          ValueError: the text is not valid Unicode.
        """

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of text in which control tokens are meant, without BOS."""

    def encode_prompt(self, prompt: str | Sequence[Part]) -> list[int]:
        """Token ids of a prompt, BOS first, with one `IMAGE_TOKEN` (-200) per image or video.

        Args:
          prompt: parts (`templates.prompt_parts`), or markup with `<image>` where images go.

        Raises:
          ValueError: the vocabulary lacks a control token, or as `encode`.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids: special tokens left out, white space stripped at both ends.

        Raises:
          ValueError: an id is negative.
        """


def tokenizer_file(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The tokenizer of a model directory: `tokenizer.model`, the tokenizer of record, or where
    there is none `tokenizer.json`. The file may be missing."""
    root = pathlib.Path(directory)
    is_bpe = not (root / SENTENCEPIECE_FILE).is_file() and (root / BPE_FILE).is_file()
    return root / (BPE_FILE if is_bpe else SENTENCEPIECE_FILE)


def load_tokenizer(path: str | os.PathLike[str], style: Style = "4.31") -> Tokenizer:
    """A tokenizer file: byte-level BPE where it ends in `.json`, else SentencePiece.

    Args:
      path: the file.
      style: of SentencePiece.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a tokenizer of the expected kind.
    """
    if pathlib.Path(path).suffix == ".json":
        return BpeTokenizer(path)
    return SentencePieceTokenizer(path, style)


class TextStream:
    """The text of one answer, piece by piece as its ids come.

    The pieces joined are what `Tokenizer.decode` makes of all ids together. White space and
    incomplete characters at the end are held back until more ids say what becomes of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._written = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids add, perhaps none."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        return self._write(text.rstrip(_INCOMPLETE).rstrip())

    def finish(self) -> str:
        """What was held back."""
        return self._write(self._tokenizer.decode(self._ids))

    def _write(self, text: str) -> str:
        piece = text[len(self._written) :]
        self._written += piece
        return piece

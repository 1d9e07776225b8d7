"""LLaMA's vocabularies, with SentencePiece itself as the tokenizer of record.

The LLaMA wrappers of Hugging Face differ from each other and from SentencePiece. Where a text
holds no literal `<s>`, `</s>` or `<unk>`, and that is nearly everywhere, SentencePiece alone
decides. Where it does (a multi-turn training text has `</s>` between its rounds), the ids depend
on the transformers version that the run to be reproduced used: `Style` names the two.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import sentencepiece

from prumerge_jax.data.templates import Part, chunks
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN

Style = Literal["4.31", "4.37"]
"""How literal special tokens inside a text are read.

`4.31`: transformers 4.31 (the PruMerge fork). White space that touches a special is dropped, and
so is the word-start mark of the text after it: `</s>USER` is `</s>`, `US`, `ER`. If what remains of
the first piece is not a piece, it becomes `<unk>`: not a style for a custom vocabulary.
`4.37`: transformers 4.37 (LLaVA >= 1.2). White space is kept, the text after a special is encoded
without a word-start mark: `</s>USER` is `</s>`, `USER`.
"""

_WORD_START = "\u2581"
# A newline is not part of any piece and encodes as the word-start mark and one byte piece (checked
# on loading). Put before a text and cut off again, it yields the text's ids without the mark.
_NEWLINE = "\n"
_NEWLINE_IDS = 2


class SentencePieceTokenizer:
    """A LLaMA SentencePiece model: identity normaliser, byte fallback, word-start dummy prefix.

    Args:
      path: the `tokenizer.model` file.
      style: how literal `<s>`, `</s>` and `<unk>` inside a text are read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a SentencePiece model of LLaMA's kind, or no such style.
    """

    def __init__(self, path: str | os.PathLike[str], style: Style = "4.31") -> None:
        if style not in get_args(Style):
            raise ValueError(f"unknown style {style!r}; expected one of {get_args(Style)}")
        self.style: str = style
        self._pieces = _load(pathlib.Path(path))
        self._special_ids = {
            self._pieces.id_to_piece(token): token
            for token in (self.bos_id, self.eos_id, self.unk_id)
        }
        self._specials = re.compile("(" + "|".join(map(re.escape, self._special_ids)) + ")")

    @property
    def bos_id(self) -> int:
        """Begin of sequence, `<s>`."""
        return self._pieces.bos_id()

    @property
    def eos_id(self) -> int:
        """End of sequence, `</s>`."""
        return self._pieces.eos_id()

    @property
    def unk_id(self) -> int:
        """The unknown piece, `<unk>`; ordinary text never becomes it, thanks to byte fallback."""
        return self._pieces.unk_id()

    @property
    def pad_id(self) -> int:
        """LLaMA has no padding piece; LLaVA pads with `<unk>`."""
        return self._pieces.unk_id()

    def sha256(self) -> str:
        """Hash of the SentencePiece model, which together with `style` decides every id."""
        return hashlib.sha256(self._pieces.serialized_model_proto()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Pieces of the model; an embedding table may be padded beyond."""
        return self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text, without BOS; a literal `</s>` in it is four characters.

        Raises:
          ValueError: the text is not valid Unicode (a lone surrogate).
        """
        return self._encode_segments([text])

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of text in which `<s>`, `</s>` and `<unk>` are meant, read as `style` says.

        Raises:
          ValueError: as `encode`.
        """
        return self._encode_segments(self._specials.split(text))

    def encode_prompt(self, prompt: str | Sequence[Part]) -> list[int]:
        """Token ids of a prompt, BOS first and one `IMAGE_TOKEN` (-200) per image or video.

        Every chunk between images is tokenised separately, so the text after an image begins with
        a word-start piece. LLaVA itself does this. Hugging Face's LlavaProcessor has no
        such piece there; LLaVA was neither trained nor published with its ids.

        Args:
          prompt: parts, or one string of markup with `<image>` where images go.

        Raises:
          ValueError: a control token is not the vocabulary's, or as `encode`.
        """
        if isinstance(prompt, str):
            first, *rest = map(self._specials.split, prompt.split(IMAGE_PLACEHOLDER))
        else:
            first, *rest = chunks(prompt)
        ids = [self.bos_id, *self._encode_segments(first)]
        for chunk in rest:
            ids += [IMAGE_TOKEN, *self._encode_segments(chunk)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids: special tokens left out, white space stripped at both ends.

        Ids at or beyond `vocab_size`, the rows that pad an embedding table, have no text and are
        left out too.

        Raises:
          ValueError: an id is negative: a placeholder or a label, never a token.
        """
        ids = [int(token) for token in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"cannot decode id {min(ids)}; expected token ids, 0 or greater")
        specials = self._special_ids.values()
        return self._pieces.decode(
            [token for token in ids if token not in specials and token < self.vocab_size]
        ).strip()

    def _encode_ordinary(self, text: str) -> list[int]:
        # As bytes, because SentencePiece's error about a lone surrogate is incomprehensible.
        return self._pieces.encode(text.encode("utf-8"))

    def _encode_segments(self, segments: Sequence[str]) -> list[int]:
        """Ids of text, control token, text, control token, ..., text."""
        if self.style == "4.31":
            return self._encode_stripped(segments)
        return self._encode_verbatim(segments)

    def _special_id(self, special: str) -> int:
        if special not in self._special_ids:
            raise ValueError(
                f"the tokenizer has no control token {special!r}, only "
                f"{sorted(self._special_ids)}; expected a template of its model"
            )
        return self._special_ids[special]

    def _encode_verbatim(self, segments: Sequence[str]) -> list[int]:
        """Style 4.37: after a special token no word-start mark, white space kept."""
        first, *rest = segments
        ids = self._encode_ordinary(first)
        for special, segment in zip(rest[0::2], rest[1::2], strict=True):
            ids.append(self._special_id(special))
            ids += self._encode_ordinary(_NEWLINE + segment)[_NEWLINE_IDS:]
        return ids

    def _encode_stripped(self, segments: Sequence[str]) -> list[int]:
        """Style 4.31: white space around a special token dropped, then the word-start mark."""
        # A literal word-start mark is a space to SentencePiece; it must be one to strip() too.
        first, *rest = (segment.replace(_WORD_START, " ") for segment in segments)
        ids = self._encode_ordinary(first.rstrip() if rest else first)
        for number in range(0, len(rest), 2):
            special, segment = rest[number], rest[number + 1].lstrip()
            is_last = number + 2 == len(rest)
            ids.append(self._special_id(special))
            ids += self._encode_unmarked(segment if is_last else segment.rstrip())
        return ids

    def _encode_unmarked(self, text: str) -> list[int]:
        """Ids of `text`, the word-start mark cut off its first piece once the pieces are chosen."""
        ids = self._encode_ordinary(text)
        if not ids:
            return ids
        first = self._pieces.id_to_piece(ids[0])
        if not first.startswith(_WORD_START):
            return ids
        bare = first.removeprefix(_WORD_START)
        return ([self._pieces.piece_to_id(bare)] if bare else []) + ids[1:]


def _load(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Reads and checks a model, so that a wrong file is found here and not at the first prompt."""
    if not path.is_file():  # reading a pipe would never end
        raise FileNotFoundError(
            f"{path}: no such file; copy the {path.name} of the LLaVA or Vicuna that the model was "
            "trained from there"
        )
    content = path.read_bytes()
    advice = "expected the SentencePiece tokenizer.model of a LLaMA, Vicuna or LLaVA directory"
    if not content:
        raise ValueError(f"{path}: the file is empty; {advice}")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a SentencePiece model; {advice}") from error
    if min(pieces.bos_id(), pieces.eos_id(), pieces.unk_id()) < 0:
        raise ValueError(f"{path}: the model lacks a <s>, </s> or <unk> piece; {advice}")
    vocabulary = pieces.id_to_piece(list(range(pieces.vocab_size())))
    newline = [vocabulary[token] for token in pieces.encode(_NEWLINE)]
    if newline != [_WORD_START, "<0x0A>"] or any(_NEWLINE in piece for piece in vocabulary):
        raise ValueError(
            f"{path}: a newline is encoded as {newline}, not as a word-start piece and a byte: the "
            f"normaliser, the dummy prefix or the byte fallback is not LLaMA's; {advice}"
        )
    return pieces

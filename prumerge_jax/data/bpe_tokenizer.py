"""Byte-level BPE vocabularies, read from the `tokenizer.json` that Qwen2 and Llama-3 ship.

Added tokens (`<|im_end|>`, `<image>`, ...) are cut out of markup before anything else. Ordinary
text is encoded by a second tokenizer that does not know them, so that no user's text becomes a
control token.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers

from prumerge_jax.data.templates import Part
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN

_MAX_BYTES = 64 << 20  # Qwen2's has 7 MB, Llama-3's 9
_ADVICE = (
    "expected the byte-level BPE tokenizer.json of a Qwen2 or Llama-3 model; a LLaMA, Vicuna or "
    "Mistral needs its tokenizer.model"
)


class BpeTokenizer:
    """A byte-level BPE tokenizer.

    Args:
      path: the `tokenizer.json` file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not such a tokenizer.
    """

    style = "bpe"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        raw = _read(pathlib.Path(path))
        fields = json.loads(raw)
        self._sha256 = hashlib.sha256(raw).hexdigest()
        self._markup = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(fields | {"added_tokens": []}))
        self._added = {token["content"]: token["id"] for token in fields["added_tokens"]}
        self._size = max(self._markup.get_vocab(with_added_tokens=True).values()) + 1
        start = self._markup.encode("", add_special_tokens=True).ids
        self._bos_id = start[0] if start else None

    @property
    def bos_id(self) -> int | None:
        """What the file puts in front of every text (Llama-3), None where it puts nothing."""
        return self._bos_id

    @property
    def pad_id(self) -> int:
        """0: no valid position reads padding."""
        return 0

    @property
    def vocab_size(self) -> int:
        """The largest id and one, added tokens included."""
        return self._size

    def sha256(self) -> str:
        """Hash of the file."""
        return self._sha256

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text, without BOS; a literal `<|im_end|>` in it is characters.

        Raises:
          ValueError: the text is not valid Unicode (a lone surrogate).
        """
        _check_unicode(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of text in which added tokens are meant, without BOS.

        Raises:
          ValueError: as `encode`.
        """
        _check_unicode(text)
        return self._markup.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str | Sequence[Part]) -> list[int]:
        """Token ids of a prompt, BOS first where there is one, `IMAGE_TOKEN` (-200) per image.

        Nothing is merged across an added token, so the ids are Hugging Face's.

        Args:
          prompt: parts, or one string of markup with `<image>` where images go.

        Raises:
          ValueError: a control token is not the vocabulary's, or as `encode`.
        """
        ids = [] if self.bos_id is None else [self.bos_id]
        if isinstance(prompt, str):
            first, *rest = prompt.split(IMAGE_PLACEHOLDER)
            ids += self.encode_markup(first)
            for chunk in rest:
                ids += [IMAGE_TOKEN, *self.encode_markup(chunk)]
            return ids
        for part in prompt:
            if part.kind == "text":
                ids += self.encode(part.text)
            else:
                ids.append(IMAGE_TOKEN if part.kind == "visual" else self._control_id(part.text))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids: special tokens left out, white space stripped at both ends.

        Ids at or beyond `vocab_size`, the rows that pad an embedding table, are left out too.

        Raises:
          ValueError: an id is negative: a placeholder or a label, never a token.
        """
        ids = [int(token) for token in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"cannot decode id {min(ids)}; expected token ids, 0 or greater")
        known = [token for token in ids if token < self.vocab_size]
        return self._markup.decode(known, skip_special_tokens=True).strip()

    def _control_id(self, text: str) -> int:
        if text not in self._added:
            raise ValueError(
                f"the tokenizer has no control token {text!r}, only {sorted(self._added)[:8]}; "
                "expected a template of its model"
            )
        return self._added[text]


def _check_unicode(text: str) -> None:
    text.encode("utf-8")


def _read(path: pathlib.Path) -> bytes:
    """The file's content, once it is known to be a byte-level BPE tokenizer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_ADVICE}")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, too many for a tokenizer; {_ADVICE}")
    raw = path.read_bytes()
    try:
        fields = json.loads(raw.decode("utf-8"))
        tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        kind = fields["model"]["type"]
        steps = fields["pre_tokenizer"].get("pretokenizers", [fields["pre_tokenizer"]])
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        added = [(token["content"], token["id"]) for token in fields["added_tokens"]]
    except Exception as error:  # the library's own exceptions derive from nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json ({str(error)[:100]}); {_ADVICE}") from None
    if kind != "BPE" or not byte_level:
        raise ValueError(f"{path}: a {str(kind)[:40]} model without byte level; {_ADVICE}")
    if not added:
        raise ValueError(f"{path}: it has no control tokens; {_ADVICE}")
    return raw

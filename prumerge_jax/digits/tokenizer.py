"""The SentencePiece model of the miniature: every word of `digits_vqa` is one piece.

A small decoder looks a place or a digit up far better when its name is one token, and the trainers
of SentencePiece promise no such thing at this size: they spend pieces on fragments or join a digit
with the mark after it. So the pieces are listed here and not learned. The rest is as in
Llama's model: `<unk>` 0, `<s>` 1, `</s>` 2, then 256 byte pieces that spell whatever the list lacks
(the newline among it), identity normaliser, dummy prefix, spaces kept.

`USER` is one piece with a space before it and without, so the label protocol `prumerge` fits in
either tokenizer style. `llava-1.2` with `4.37` counts on Llama's two pieces for ` USER` and would
drop the labels of every conversation of several rounds.
"""

import re
from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from prumerge_jax.data.templates import TEMPLATES, training_prompt
from prumerge_jax.digits import questions as digits_questions

_model_pb: Any = sentencepiece_model_pb2  # makes its classes on import, out of a checker's sight
_PIECE_KIND = _model_pb.ModelProto.SentencePiece
_SPACE = "\u2581"
_PIECE = re.compile(rf"{_SPACE}?(?:[A-Za-z]+|[0-9])|{_SPACE}|[^\s{_SPACE}]")


def build_for_digits() -> bytes:
    """The miniature's `tokenizer.model`: every word of `digits_vqa` and of template vicuna_v1."""
    template = TEMPLATES["vicuna_v1"]
    texts = digits_questions.vocabulary_texts()
    # A question follows `<image>` and a newline or, in a later round, the role.
    prompts = [training_prompt(template, [f"\n{text}", "yes", text, "no"]) for text in texts]
    return build(prompt.replace("</s>", "\n") for prompt in prompts)


def build(texts: Iterable[str]) -> bytes:
    """A serialised model (the content of a `tokenizer.model`) for the words of `texts`.

    Words, single digits and punctuation marks become pieces, with the space before them where there
    is one, and where a text or a line starts with them, in both forms: the dummy prefix
    falls on the first chunk of a prompt only. The same texts give the same bytes.
    """
    model = _model_pb.ModelProto()
    _add_piece(model, "<unk>", _PIECE_KIND.UNKNOWN, 0.0)
    _add_piece(model, "<s>", _PIECE_KIND.CONTROL, 0.0)
    _add_piece(model, "</s>", _PIECE_KIND.CONTROL, 0.0)
    for byte in range(256):
        _add_piece(model, f"<0x{byte:02X}>", _PIECE_KIND.BYTE, 0.0)
    # With equal scores the segmentation of fewest pieces has the highest sum.
    for piece in sorted(_pieces(texts)):
        _add_piece(model, piece, _PIECE_KIND.NORMAL, -1.0)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _model_pb.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def _pieces(texts: Iterable[str]) -> set[str]:
    found = {_SPACE}
    for text in texts:
        for line in text.split("\n"):
            found.update(_PIECE.findall(line.replace(" ", _SPACE)))
            found.update(_PIECE.findall(_SPACE + line.replace(" ", _SPACE)))
    return found


def _add_piece(model: Any, piece: str, kind: int, score: float) -> None:
    added = model.pieces.add()
    added.piece, added.type, added.score = piece, kind, score

"""`tokenizer.model` or `tokenizer.json`, without which a converted model reads no text."""

import pathlib

import sentencepiece

from prumerge_jax.conversion.tensor_files import ConversionError

TOKENIZER = "tokenizer.model"
BPE_TOKENIZER = "tokenizer.json"
_MAX_BYTES = 16 << 20  # LLaMA's has 0.5 MB


def check_tokenizer(path: pathlib.Path, vocab_size: int) -> None:
    """Checks that a file is a SentencePiece model that fits a vocabulary.

    Args:
      path: a regular file.
      vocab_size: rows of the embedding; it may have more rows than there are pieces.

    Raises:
      ConversionError: it is not such a model, or has more pieces.
      OSError: it cannot be read.
    """
    advice = f"put the {TOKENIZER} of the LLaVA or Vicuna that the model was trained from there"
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ConversionError(f"{path} has {size} bytes, too many for a tokenizer; {advice}")
    try:
        content = path.read_bytes()
        if not content:
            raise RuntimeError("empty")
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise ConversionError(f"{path} is not a SentencePiece model; {advice}") from None
    if min(pieces.bos_id(), pieces.eos_id(), pieces.unk_id()) < 0:
        raise ConversionError(f"{path} lacks a <s>, </s> or <unk> piece; {advice}")
    if pieces.vocab_size() > vocab_size:
        raise ConversionError(
            f"{path} has {pieces.vocab_size()} pieces, the model's embedding {vocab_size} rows: "
            f"they do not belong together; {advice}"
        )


def missing_tokenizer_warning(output: pathlib.Path) -> str:
    """One line for the user of a checkpoint that has no `tokenizer.model`."""
    return (
        f"warning: the checkpoint has no {TOKENIZER}, so that {output} cannot be loaded yet: copy "
        f"the one of the LLaVA or Vicuna that the model was trained from to {output / TOKENIZER}"
    )

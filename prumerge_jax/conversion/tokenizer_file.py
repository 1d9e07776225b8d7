"""`tokenizer.model` or `tokenizer.json`, without which a converted model reads no text."""

import pathlib

import sentencepiece
import tokenizers

from prumerge_jax.conversion.tensor_files import ConversionError

TOKENIZER = "tokenizer.model"
BPE_TOKENIZER = "tokenizer.json"
_MAX_BYTES = 16 << 20  # LLaMA's has 0.5 MB
_MAX_BPE_BYTES = 64 << 20  # Llama-3's has 9 MB


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


def check_bpe_tokenizer(path: pathlib.Path, vocab_size: int) -> None:
    """Checks that a `tokenizer.json` can be read and fits a vocabulary; as `check_tokenizer`."""
    advice = f"put the {BPE_TOKENIZER} that the model was published with there"
    if (size := path.stat().st_size) > _MAX_BPE_BYTES:
        raise ConversionError(f"{path} has {size} bytes, too many for a tokenizer; {advice}")
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library's own exceptions derive from nothing narrower
        raise ConversionError(f"{path} is not a tokenizer ({str(error)[:100]}); {advice}") from None
    if (rows := max(vocabulary.values(), default=-1) + 1) > vocab_size:
        raise ConversionError(
            f"{path} has ids up to {rows - 1}, the model's embedding {vocab_size} rows: they do "
            f"not belong together; {advice}"
        )


def missing_tokenizer_warning(output: pathlib.Path, name: str = TOKENIZER) -> str:
    """One line for the user of a checkpoint that has no tokenizer of this name."""
    return (
        f"warning: the checkpoint has no {name}, so that {output} cannot be loaded yet: copy "
        f"the one of the model that it was trained from to {output / name}"
    )


def unknown_template_warning(output: pathlib.Path) -> str:
    """One line for the user of a checkpoint whose chat template is not known."""
    return (
        f"warning: the chat template of {output} is not known; name one with each prompt, as "
        "conversation='vicuna_v1'"
    )

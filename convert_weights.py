"""Converts LLaVA checkpoints between PyTorch's layouts and our model directory.

python convert_weights.py --input llava-1.5-7b-hf --output llava-1.5-7b --dtype bfloat16
python convert_weights.py --input llava-v1.5-7b --vision_tower clip-vit-large-patch14-336 \
    --allow_pickle --output llava-1.5-7b
python convert_weights.py --input vicuna-7b-v1.5 --adapter llava-v1.5-7b-lora-prunemerge \
    --vision_tower clip-vit-large-patch14-336 --allow_pickle --merge --output prumerge-7b
python convert_weights.py --to hf --input llava-1.5-7b --output llava-1.5-7b-hf
"""

import pathlib
import sys

import jax
import tqdm
from absl import app, flags

from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.detect import Kind, detect
from prumerge_jax.conversion.download import download
from prumerge_jax.conversion.export import export_adapter, export_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.tensor_files import ConversionError, listing
from prumerge_jax.conversion.tokenizer_file import missing_tokenizer_warning
from prumerge_jax.conversion.verify import check_comparable, compare_with_torch
from prumerge_jax.store.atomic import require_new

_INPUT = flags.DEFINE_string("input", None, "Directory of the model, or of its language model.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must not exist.", required=True)
_TO = flags.DEFINE_enum(
    "to",
    "jax",
    ["jax", "hf", "llava", "peft"],
    "jax: our directory. From our directory: hf (transformers), llava (original code), "
    "peft (adapters and projector).",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "Dtype of all weights; by default as stored.",
)
_TOWER = flags.DEFINE_string("vision_tower", None, "CLIP directory, for inputs without a tower.")
_PROJECTOR = flags.DEFINE_string("projector", None, "Stage-1 directory, for a plain LLaMA.")
_ADAPTER = flags.DEFINE_string("adapter", None, "LoRA directory of PEFT.")
_ADAPTER_BASE = flags.DEFINE_string(
    "adapter_base", None, "Name of the model the adapter belongs on, as the adapter declares it."
)
_MERGE = flags.DEFINE_bool("merge", False, "Add adapters to the weights instead of keeping them.")
_ALLOW_PICKLE = flags.DEFINE_bool(
    "allow_pickle", False, "Read .bin files too; they are interpreted, never executed."
)
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare logits with PyTorch's model afterwards; needs torch."
)
_DOWNLOAD = flags.DEFINE_string(
    "download", "", "Hugging Face repository to use as --input; needs --revision."
)
_REVISION = flags.DEFINE_string("revision", "", "Commit of --download, 40 digits.")

# Rounding weights to bfloat16 costs well below this; a wrong layout far more.
_MAX_KL = 0.01
# Flags that say something only with these values of --to.
_READ_WITH = (
    (_DTYPE, ("jax",)),
    (_TOWER, ("jax",)),
    (_PROJECTOR, ("jax",)),
    (_ADAPTER, ("jax",)),
    (_ADAPTER_BASE, ("jax", "peft")),
    (_MERGE, ("jax", "hf", "llava")),
    (_ALLOW_PICKLE, ("jax",)),
    (_VERIFY, ("jax",)),
    (_DOWNLOAD, ("jax",)),
    (_REVISION, ("jax",)),
)


def main(argv: list[str]) -> None:
    """Runs the conversion; status 1 and one line on stderr where it is refused."""
    jax.config.update("jax_platforms", "cpu")  # weights pass through host memory only
    try:
        _check_flags(argv[1:])
        output = pathlib.Path(_OUTPUT.value)
        require_new(output)
        if _INPUT.value:
            folder = pathlib.Path(_INPUT.value)
        else:
            folder = download(_DOWNLOAD.value, _REVISION.value)
        detection = detect(folder)
        print(f"{folder} is {detection.kind.value}: {detection.reason}")
        if _TO.value == "jax":
            import_checkpoint(folder, output)
        elif detection.kind is Kind.OURS:
            export_directory(folder, output)
        else:
            raise ConversionError(f"--to={_TO.value} needs one of our directories as --input")
    except (ValueError, OSError) as error:  # all classes of ours derive from ValueError
        sys.exit(f"convert_weights.py: {' '.join(str(error).split())}")


def _check_flags(unexpected: list[str]) -> None:
    """Refuses what would be ignored.

    Raises:
      ConversionError: flags are missing or contradict each other.
    """
    if unexpected:
        raise ConversionError(f"unexpected arguments: {listing(unexpected)}")
    if bool(_INPUT.value) == bool(_DOWNLOAD.value):
        raise ConversionError("give one of --input and --download")
    to = _TO.value
    if unused := [f.name for f, targets in _READ_WITH if f.value and to not in targets]:
        raise ConversionError(f"--to={to} takes no --{' --'.join(unused)}")
    if _REVISION.value and not _DOWNLOAD.value:
        raise ConversionError("--revision is the commit of --download, which is not given")
    if to == "jax" and _ADAPTER_BASE.value and not _ADAPTER.value:
        raise ConversionError("--adapter_base speaks of an adapter; give it as --adapter")
    if to == "jax" and _MERGE.value and not _ADAPTER.value:
        raise ConversionError("--merge needs an adapter to merge, given as --adapter")


def import_checkpoint(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Writes our directory from a checkpoint."""
    tower, projector, adapter = (
        pathlib.Path(flag.value) if flag.value else None for flag in (_TOWER, _PROJECTOR, _ADAPTER)
    )
    sources = Sources(
        folder,
        vision_tower=tower,
        projector=projector,
        adapter=adapter,
        adapter_base=_ADAPTER_BASE.value,
        merge=_MERGE.value,
        allow_pickle=_ALLOW_PICKLE.value,
    )
    model = open_model(sources)
    if _VERIFY.value:
        check_comparable(model.config)
    dtype = jax.numpy.dtype(_DTYPE.value) if _DTYPE.value else None
    with tqdm.tqdm(total=model.nbytes, unit="B", unit_scale=True) as bar:
        report = convert(model, output, dtype=dtype, progress=bar.update)
    print(f"{output}: {report.summary()}")
    if not model.has_tokenizer:
        print(missing_tokenizer_warning(output), file=sys.stderr)
    if _VERIFY.value:
        comparison = compare_with_torch(model, output)
        print(comparison.summary())
        if comparison.kl > _MAX_KL:
            raise ConversionError(f"{output} does not compute what its checkpoint does")


def export_directory(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Writes a checkpoint from our directory."""
    if _TO.value == "peft":
        export_adapter(folder, output, base=_ADAPTER_BASE.value)
    else:
        dialect = {"hf": Dialect.HF, "llava": Dialect.LLAVA}[_TO.value]
        with tqdm.tqdm(unit="B", unit_scale=True) as bar:
            export_model(folder, output, dialect, merge=_MERGE.value, progress=bar.update)
    print(f"{output} written")


if __name__ == "__main__":
    app.run(main)

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
from prumerge_jax.conversion.tensor_files import CheckpointError
from prumerge_jax.conversion.verify import compare_with_torch
from prumerge_jax.store.manifest import DirectoryError

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
    "dtype", None, ["float32", "float16", "bfloat16"], "Of all weights; default: as they are."
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
# Flags that say how a checkpoint is read, and mean nothing on the way out.
_ONLY_IN = (_DTYPE, _TOWER, _PROJECTOR, _ADAPTER, _ALLOW_PICKLE, _VERIFY)


def main(argv: list[str]) -> None:
    """Runs the conversion; status 1 and one line on stderr where it is refused."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if bool(_INPUT.value) == bool(_DOWNLOAD.value):
        raise app.UsageError("give one of --input and --download")
    if _TO.value != "jax" and (unused := [f.name for f in _ONLY_IN if f.value]):
        raise app.UsageError(f"--to={_TO.value} takes no --{' --'.join(unused)}")
    jax.config.update("jax_platforms", "cpu")  # weights pass through host memory only
    try:
        if _INPUT.value is not None:
            folder = pathlib.Path(_INPUT.value)
        else:
            folder = download(_DOWNLOAD.value, _REVISION.value)
        detection = detect(folder)
        print(f"{folder} is {detection.kind.value}: {detection.reason}")
        if _TO.value == "jax":
            import_checkpoint(folder, pathlib.Path(_OUTPUT.value))
        elif detection.kind is Kind.OURS:
            export_directory(folder, pathlib.Path(_OUTPUT.value))
        else:
            raise CheckpointError(f"--to={_TO.value} needs one of our directories as --input")
    except (CheckpointError, DirectoryError, OSError) as error:
        sys.exit(f"error: {error}")


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
    total = sum(tensor.info.nbytes for tensor in model.tensors.values())
    if model.adapter is not None:
        total += sum(tensor.info.nbytes for tensor in model.adapter.tensors.values())
    dtype = jax.numpy.dtype(_DTYPE.value) if _DTYPE.value else None
    with tqdm.tqdm(total=total, unit="B", unit_scale=True) as bar:
        report = convert(model, output, dtype=dtype, progress=bar.update)
    print(
        f"{output}: {report.parameters:,} parameters from {report.tensors_in} tensors, "
        f"{report.kept_aside} unused ones kept aside, {len(model.ignored)} left out"
    )
    if _VERIFY.value:
        comparison = compare_with_torch(model, output)
        print(comparison.summary())
        if comparison.kl > _MAX_KL:
            raise CheckpointError(f"{output} does not compute what its checkpoint does")


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

"""Converts LLaVA checkpoints between PyTorch's layouts and our model directory.

convert_weights.py --input llava-1.5-7b-hf --output llava-1.5-7b --dtype bfloat16
convert_weights.py --input llava-v1.5-7b --vision_tower clip-vit-large-patch14-336
    --allow_pickle --output llava-1.5-7b
convert_weights.py --input vicuna-7b-v1.5 --adapter llava-v1.5-7b-lora-prunemerge
    --vision_tower clip-vit-large-patch14-336 --allow_pickle --merge --output prumerge-7b
convert_weights.py --input llava-1.5-7b-hf --output llava-1.5-7b-int8 --quantize int8
convert_weights.py --input llava-1.5-7b --push USER/llava-1.5-7b
convert_weights.py --to hf --input llava-1.5-7b --output llava-1.5-7b-hf
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from prumerge_jax.cli import command_line

# Rounding weights to bfloat16 costs well below this; a wrong layout far more.
_MAX_KL = 0.01

_READ_WITH = {
    **dict.fromkeys(
        ("dtype", "quantize", "vision_tower", "projector", "adapter", "allow_pickle", "verify"),
        ("jax",),
    ),
    **dict.fromkeys(("download", "revision"), ("jax",)),
    "adapter_base": ("jax", "peft"),
    "merge": ("jax", "hf", "llava"),
}
"""Flags that mean something only with these values of `--to`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `convert_weights.py` or `prumerge-convert`."""
    command_line.run(_main, argv)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    for name, help_text in (
        ("input", "directory of the model, or of its language model"),
        ("output", "directory to write; must not exist"),
        ("vision_tower", "CLIP directory, for inputs without a tower"),
        ("projector", "stage-1 directory, for a plain LLaMA"),
        ("adapter", "LoRA directory of PEFT"),
        ("adapter_base", "name of the model that the adapter belongs on, as the adapter has it"),
        ("download", "Hugging Face repository to use as --input; needs --revision"),
        ("revision", "commit of --download, 40 digits"),
        ("push", "Hugging Face repository, USER/NAME, to put --input into, one of our directories"),
    ):
        flags.DEFINE_string(name, None, help_text, flag_values=values)
    flags.DEFINE_enum(
        "to",
        "jax",
        ["jax", "hf", "llava", "peft"],
        "jax: our directory. From our directory: hf (transformers), llava (original code), "
        "peft (adapters and projector)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16", "bfloat16"],
        "dtype of all weights; by default as stored",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "quantize",
        None,
        ["int8", "int8x8", "int4", "nf4"],
        "format of the kernels of the decoder's layers; docs/quantisation.md",
        flag_values=values,
    )
    for name, help_text in (
        ("merge", "add adapters to the weights instead of keeping them"),
        ("allow_pickle", "read .bin files too; they are interpreted, never executed"),
        ("verify", "compare logits with PyTorch's model afterwards; needs torch"),
    ):
        flags.DEFINE_bool(name, False, help_text, flag_values=values)
    return values


def _main(argv: Sequence[str]) -> None:
    values = _flags()
    command_line.parse(argv, values, __doc__)
    if values.push:
        _push(values)
        return
    _check(values)
    # These take seconds to import; a mistyped flag is answered before.
    import jax

    from prumerge_jax.conversion.detect import Kind, detect
    from prumerge_jax.conversion.download import download
    from prumerge_jax.store.atomic import require_new

    require_new(pathlib.Path(values.output))
    jax.config.update("jax_platforms", "cpu")  # weights pass through host memory only
    if values.input is not None:
        folder = pathlib.Path(values.input)
    else:
        folder = download(values.download, values.revision or "")
    detection = detect(folder)
    print(f"{folder} is {detection.kind.value}: {detection.reason}")
    if values.to == "jax":
        _import(folder, values)
    elif detection.kind is Kind.OURS:
        _export(folder, values)
    else:
        raise ValueError(f"--to={values.to} needs one of our directories as --input")


def _check(values: flags.FlagValues) -> None:
    """Raises ValueError where flags are missing or contradict each other."""
    if not values.output:
        raise ValueError("--output is missing: the directory to write, which must not exist")
    if bool(values.input) == bool(values.download):
        raise ValueError("give one of --input and --download")
    if values.revision and not values.download:
        raise ValueError("--revision is the commit of --download, which is not given")
    unused = [name for name, targets in _READ_WITH.items() if values.to not in targets]
    if unused := [name for name in unused if values[name].value]:
        raise ValueError(f"--to={values.to} takes no --{' --'.join(unused)}")
    if values.quantize and values.verify:
        raise ValueError(
            "--verify compares equal weights, which --quantize changes: convert with one of them"
        )
    for name in ("merge", "adapter_base"):
        if values.to == "jax" and values[name].value and not values.adapter:
            raise ValueError(f"--{name} is about an adapter; give it as --adapter")


def _push(values: flags.FlagValues) -> None:
    """Puts one of our directories on the hub."""
    others = [name for name in (*_READ_WITH, "output") if values[name].value]
    if not values.input or others or values.to != "jax":
        raise ValueError("--push takes --input alone: one of our directories")
    from prumerge_jax.conversion import hub

    print(f"pushed: {hub.push(pathlib.Path(values.input), values.push)}")


def _import(folder: pathlib.Path, values: flags.FlagValues) -> None:
    """Writes our directory from a checkpoint."""
    import jax
    import tqdm

    from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
    from prumerge_jax.conversion.convert import convert
    from prumerge_jax.conversion.tokenizer_file import (
        missing_tokenizer_warning,
        unknown_template_warning,
    )
    from prumerge_jax.conversion.verify import check_comparable, compare_with_torch

    tower, projector, adapter = (
        pathlib.Path(path) if path else None
        for path in (values.vision_tower, values.projector, values.adapter)
    )
    sources = Sources(
        folder,
        vision_tower=tower,
        projector=projector,
        adapter=adapter,
        adapter_base=values.adapter_base,
        merge=values.merge,
        allow_pickle=values.allow_pickle,
    )
    output = pathlib.Path(values.output)
    model = open_model(sources)
    if values.verify:
        check_comparable(model.config)
    dtype = jax.numpy.dtype(values.dtype) if values.dtype else None
    with tqdm.tqdm(total=model.nbytes, unit="B", unit_scale=True) as bar:
        report = convert(model, output, dtype=dtype, quantize=values.quantize, progress=bar.update)
    print(f"{output}: {report.summary()}")
    if not model.has_tokenizer:
        print(missing_tokenizer_warning(output, model.tokenizer_name), file=sys.stderr)
    if model.config.chat_template is None:
        print(unknown_template_warning(output), file=sys.stderr)
    if values.verify:
        comparison = compare_with_torch(model, output)
        print(comparison.summary())
        if comparison.kl > _MAX_KL:
            raise ValueError(f"{output} does not compute what its checkpoint does")


def _export(folder: pathlib.Path, values: flags.FlagValues) -> None:
    """Writes a checkpoint from our directory."""
    import tqdm

    from prumerge_jax.conversion.export import export_adapter, export_model
    from prumerge_jax.conversion.keys import Dialect

    output = pathlib.Path(values.output)
    target = values.to
    if target == "peft":
        export_adapter(folder, output, base=values.adapter_base)
    else:
        dialect = {"hf": Dialect.HF, "llava": Dialect.LLAVA}[target]
        with tqdm.tqdm(unit="B", unit_scale=True) as bar:
            export_model(folder, output, dialect, merge=values.merge, progress=bar.update)
    print(f"{output} written")


if __name__ == "__main__":
    main()

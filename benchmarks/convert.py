"""Peak memory and speed of a conversion, and of loading onto eight devices.

    python benchmarks/convert.py
    python benchmarks/convert.py --model llava-1.5-13b --layers 0 --export
    python benchmarks/convert.py --layers 0 --quantize int8 nf4

Writes a random bfloat16 checkpoint in llava-hf's layout, sharded, converts it, loads what came out
onto a mesh of eight CPU devices, and converts back or into fewer bits if asked, each in a separate
process. The devices are parts of the host's memory: all shards together are as large as the
checkpoint.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from measuring import add_arguments, begin, peak_resident_gb, progress, report

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.export import export_model
from prumerge_jax.conversion.hf_files import hf_config
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import ShardedWriter
from prumerge_jax.conversion.tensor_files import TensorInfo
from prumerge_jax.families import published
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import FORMATS
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.store import model_directory as directory
from prumerge_jax.training.weights import llava_module

DEVICES = 8


def write_random_checkpoint(config: LlavaConfig, folder: pathlib.Path) -> int:
    """A checkpoint of random bfloat16 numbers; returns its bytes of tensors."""
    folder.mkdir(parents=True)
    shapes = keys.expected_shapes(keys.weights(config)) | keys.unused_tower_tensors(config)
    infos = {
        keys.dialect_key(key, Dialect.HF, config): TensorInfo(shape, np.dtype(jnp.bfloat16))
        for key, shape in shapes.items()
    }
    rng = np.random.default_rng(0)
    writer = ShardedWriter(folder, infos)
    for key, info in infos.items():
        bits = rng.integers(0, 1 << 16, int(np.prod(info.shape)), np.uint16)
        bits &= 0xBFFF  # below 2: never NaN or infinity
        writer.write(key, bits.view(jnp.bfloat16).reshape(info.shape))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    return sum(info.nbytes for info in infos.values())


def to_ours(source: pathlib.Path, target: pathlib.Path) -> None:
    """Checkpoint -> our directory."""
    convert(open_model(Sources(source)), target)


def to_devices(source: pathlib.Path, target: pathlib.Path) -> None:
    """Our directory -> 8 devices. Weights are split as in training; `target` is not used."""
    module = llava_module(config_json.read_config(source), None)
    shardings = module.shardings(make_mesh(fsdp=DEVICES))
    targets = {
        path: jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16, sharding=shardings[path])
        for path, shape in module.shapes().items()
    }
    jax.block_until_ready(directory.load_arrays(source, targets))


def to_hf(source: pathlib.Path, target: pathlib.Path) -> None:
    """Our directory -> checkpoint."""
    export_model(source, target, Dialect.HF)


def to_format(name: str) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """A step into a format of fewer bits."""

    def step(source: pathlib.Path, target: pathlib.Path) -> None:
        convert(open_model(Sources(source)), target, quantize=name)

    step.__doc__ = f"Checkpoint -> our directory in {name}."
    return step


STEPS = {step.__name__: step for step in (to_ours, to_devices, to_hf)}
STEPS |= {f"to_{name}": to_format(name) for name in FORMATS}


def timed(step: str, source: str, target: str, nbytes: int) -> None:
    """Runs one step and prints what it took as JSON; alone in its process."""
    run, before = STEPS[step], peak_resident_gb()
    start = time.perf_counter()
    run(pathlib.Path(source), pathlib.Path(target))
    seconds = time.perf_counter() - start
    result = {
        "step": str(run.__doc__).split(".")[0],
        "peak_gb": peak_resident_gb(),
        "imports_gb": before,
        "seconds": seconds,
        "gb_per_s": nbytes / 1e9 / seconds,
    }
    print(json.dumps(result))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the arguments and runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llava-1.5-7b", help="a published size")
    parser.add_argument(
        "--layers", type=int, default=2, help="of its decoder; 0: all (default: %(default)s)"
    )
    parser.add_argument("--scratch", help="where to work; needs three times the checkpoint's size")
    parser.add_argument("--export", action="store_true", help="convert back as well")
    parser.add_argument(
        "--quantize", nargs="*", default=[], choices=sorted(FORMATS), help="formats to convert into"
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("convert", __doc__, minutes=1)
    jax.config.update("jax_platforms", "cpu")
    config = published(arguments.model)
    if arguments.layers:
        text = dataclasses.replace(config.text, num_layers=arguments.layers)
        config = dataclasses.replace(config, text=text)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        checkpoint, ours, back = (f"{scratch}/{name}" for name in ("checkpoint", "ours", "back"))
        nbytes = write_random_checkpoint(config, pathlib.Path(checkpoint))
        stack = max(2 * int(np.prod(weight.shape)) for weight in keys.weights(config))
        note = f"checkpoint {nbytes / 1e9:.2f} GB, largest stacked weight {stack / 1e9:.2f} GB"
        progress(note)
        steps = [("to_ours", checkpoint, ours), ("to_devices", ours, back)]
        if arguments.export:
            steps.append(("to_hf", ours, back))
        steps += [(f"to_{name}", checkpoint, f"{scratch}/{name}") for name in arguments.quantize]
        flags = f"--xla_force_host_platform_device_count={DEVICES}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        results = []
        for step in steps:
            program = (
                "import sys; from convert import timed; timed(*sys.argv[1:4], int(sys.argv[4]))"
            )
            command = [sys.executable, "-c", program, *step, str(nbytes)]
            folder = pathlib.Path(__file__).parent
            done = subprocess.run(
                command, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
            progress(f"{results[-1]['step']}: {results[-1]['seconds']:.1f} s")
    report("convert", arguments, results, notes=[note])


if __name__ == "__main__":
    main()

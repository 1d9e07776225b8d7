"""Peak memory and speed of a conversion.

Writes a random bfloat16 checkpoint in llava-hf's layout, sharded, and converts it, and back if
asked, each in a process of its own:

    python benchmarks/convert.py --model llava-1.5-7b --layers 6 --export
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np
from measuring import peak_resident_gb

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.export import export_model
from prumerge_jax.conversion.inputs import Sources, open_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.outputs import hf_config
from prumerge_jax.conversion.safetensors_io import ShardedWriter
from prumerge_jax.conversion.source import TensorInfo
from prumerge_jax.models.config import LlavaConfig, published


def write_random_checkpoint(config: LlavaConfig, folder: pathlib.Path) -> int:
    """A checkpoint of random bfloat16 numbers; returns its bytes of tensors."""
    folder.mkdir(parents=True)
    shapes = keys.expected_shapes(keys.weights(config)) | keys.passthrough(config.vision)
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


def timed(step: str, source: str, target: str, nbytes: int) -> None:
    """Runs one step and prints what it took; alone in its process."""
    start = time.perf_counter()
    if step == "checkpoint -> our directory":
        convert(open_model(Sources(pathlib.Path(source))), target)
    else:
        export_model(pathlib.Path(source), pathlib.Path(target), Dialect.HF)
    seconds = time.perf_counter() - start
    print(
        f"{step}: peak resident memory {peak_resident_gb():.2f} GB, {seconds:.1f} s, "
        f"{nbytes / 1e9 / seconds:.2f} GB/s"
    )


def main() -> None:
    """Reads the arguments and runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llava-1.5-7b", help="a published size")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than it has")
    parser.add_argument("--scratch", help="where to work; needs three times the checkpoint's size")
    parser.add_argument("--export", action="store_true", help="convert back as well")
    arguments = parser.parse_args()
    config = published(arguments.model)
    if arguments.layers:
        text = dataclasses.replace(config.text, num_layers=arguments.layers)
        config = dataclasses.replace(config, text=text)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        checkpoint, ours, back = (f"{scratch}/{name}" for name in ("checkpoint", "ours", "back"))
        nbytes = write_random_checkpoint(config, pathlib.Path(checkpoint))
        stack = max(2 * int(np.prod(weight.shape)) for weight in keys.weights(config))
        print(f"checkpoint {nbytes / 1e9:.2f} GB, largest stacked weight {stack / 1e9:.2f} GB")
        steps = [("checkpoint -> our directory", checkpoint, ours)]
        if arguments.export:
            steps.append(("our directory -> checkpoint", ours, back))
        for step in steps:
            program = (
                "import sys; from benchmarks.convert import timed; "
                "timed(*sys.argv[1:4], int(sys.argv[4]))"
            )
            command = [sys.executable, "-c", program, *step, str(nbytes)]
            subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parents[1])


if __name__ == "__main__":
    main()

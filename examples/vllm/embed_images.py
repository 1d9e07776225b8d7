"""Writes what vLLM takes in the place of an image: its reduced, projected visual tokens.

    python embed_images.py --checkpoint llava-1.5-7b --output embedded a.jpg b.jpg

makes `embedded/a.pt` and `embedded/b.pt`, bfloat16 [n, width of the decoder] each; see
docs/vllm.md.
"""

import argparse
import pathlib

import numpy as np
import torch

from prumerge_jax import Llava


def main(argv: list[str] | None = None) -> None:
    """Writes a file for every image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=pathlib.Path)
    parser.add_argument("--checkpoint", required=True, help="model directory, or miniature")
    parser.add_argument("--reduction", default="prumerge+")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    llava = Llava.load(arguments.checkpoint)
    arguments.output.mkdir(parents=True, exist_ok=True)
    embedded = llava.embed(arguments.images, reduction=arguments.reduction)
    for path, tokens in zip(arguments.images, embedded, strict=True):
        target = arguments.output / f"{path.stem}.pt"
        torch.save(torch.from_numpy(np.array(tokens)).to(torch.bfloat16), target)
        print(f"{target}: {len(tokens)} visual tokens of {tokens.shape[1]} numbers")


if __name__ == "__main__":
    main()

"""Converts checkpoints: `python convert_weights.py --input DIR --output DIR`; see `--help`."""

from prumerge_jax.cli.convert import main

if __name__ == "__main__":
    main()

"""Trains a LLaVA, or a part of one: `python train.py --config configs/NAME.py --workdir DIR`."""

from prumerge_jax.cli.train import main

if __name__ == "__main__":
    main()

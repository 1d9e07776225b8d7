"""`python -m prumerge_jax.reductions.calibrate`, which is `prumerge_jax.cli.calibrate`."""

from prumerge_jax.cli.calibrate import main

if __name__ == "__main__":
    main()

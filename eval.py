"""Scores a model, or an answers file, on benchmarks: `python eval.py --workdir DIR`."""

from prumerge_jax.cli.evaluate import main

if __name__ == "__main__":
    main()

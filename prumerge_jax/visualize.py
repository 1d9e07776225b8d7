"""`python -m prumerge_jax.visualize`, which is `prumerge-visualize`."""

from prumerge_jax.cli.visualize import main

if __name__ == "__main__":
    main()

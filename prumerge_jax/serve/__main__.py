"""`python -m prumerge_jax.serve`, which is `prumerge-serve`."""

import sys


def main() -> None:
    """Serves; a user's mistake is one line."""
    # Here, because processes that decode images import this module too.
    from prumerge_jax.serve.config import parse_flags

    try:
        config = parse_flags(sys.argv[1:])
        from prumerge_jax.serve.run import serve

        status = serve(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"prumerge-serve: {' '.join(str(error).split()) or type(error).__name__}")
    sys.exit(status)


if __name__ == "__main__":
    main()

"""One file per thing a user runs; each has `get_config`."""

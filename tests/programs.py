"""Programs as a user runs them, but in this process: imports and compiled functions are shared."""

import contextlib
import io
import subprocess
from unittest import mock

import jax

from prumerge_jax.cli import convert, evaluate, train

MAINS = {"train.py": train.main, "eval.py": evaluate.main, "convert_weights.py": convert.main}


def run_program(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Exit status and output of a program, as a separate process would have them."""
    stdout, stderr = io.StringIO(), io.StringIO()
    status: int | str | None = 0
    # JAX refuses to look for other processes once it has run anything; here there are none.
    alone = ValueError("coordinator_address should be defined")
    with (
        mock.patch.object(jax.distributed, "initialize", side_effect=alone),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            MAINS[script]([script, *flags])
        except SystemExit as end:
            status = end.code
    if isinstance(status, str):
        stderr.write(f"{status}\n")
        status = 1
    return subprocess.CompletedProcess(
        [script, *flags], status or 0, stdout.getvalue(), stderr.getvalue()
    )

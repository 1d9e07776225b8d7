"""Programs as a user runs them, forked from a server that has imported what they need."""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imported once; none of these starts a thread or a JAX backend, or defines a flag.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "prumerge_jax.llava",
        "prumerge_jax.aot.inference",
        "prumerge_jax.aot.training",
        "prumerge_jax.conversion.verify",
        "prumerge_jax.evaluation.run",
        "prumerge_jax.training.run",
    ]
)


def start(
    script: str,
    *flags: str,
    stdout: pathlib.Path,
    stderr: pathlib.Path,
    folder: pathlib.Path = ROOT,
) -> BaseProcess:
    """A script of the repository on its way, with the environment of this process.

    Args:
      script: path below the root of the repository.
      stdout, stderr: files that receive the output.
      folder: working directory.
    """
    arguments = [str(ROOT / script), *flags]
    process = _SERVER.Process(
        target=_main, args=(arguments, folder, dict(os.environ), stdout, stderr)
    )
    process.start()
    return process


def run_program(
    script: str, *flags: str, folder: pathlib.Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Exit status and output of a script of the repository, run to its end."""
    with tempfile.TemporaryDirectory() as temporary:
        stdout, stderr = (pathlib.Path(temporary) / name for name in ("stdout", "stderr"))
        process = start(script, *flags, stdout=stdout, stderr=stderr, folder=folder)
        process.join()
        return subprocess.CompletedProcess(
            [script, *flags], process.exitcode, stdout.read_text(), stderr.read_text()
        )


def _main(
    arguments: list[str],
    folder: pathlib.Path,
    environment: dict[str, str],
    stdout: pathlib.Path,
    stderr: pathlib.Path,
) -> None:
    for path, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), standard)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = str(pathlib.Path(arguments[0]).parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked child would leave out

"""Fixtures shared by all tests."""

import os
import pathlib

import hypothesis
import pytest

# A commit that has passed passes again: examples depend on the code alone, time decides nothing.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Set before jax is first imported: sharding is tested on eight virtual CPU devices, and the tests
# compile far more than they compute.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1",
)


def golden_dir() -> pathlib.Path | None:
    """The folder of reference outputs, or None where this machine has none."""
    beside_checkout = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = pathlib.Path(os.environ.get("PRUMERGE_GOLDEN", beside_checkout))
    return folder if folder.is_dir() else None


def require_eight_devices() -> None:
    """Skips the test where the caller's own XLA_FLAGS leave fewer."""
    import jax  # here, because it reads the variables above when it is first imported

    if jax.device_count() < 8:
        pytest.skip("needs eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    folder = golden_dir()
    if folder is None:
        pytest.skip("no golden data: set PRUMERGE_GOLDEN to the folder of reference outputs")
    return folder

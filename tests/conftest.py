"""Fixtures shared by all tests."""

import gc
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator
from importlib import metadata

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
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)


def compilation_cache() -> pathlib.Path:
    """Folder of compiled functions, one per jaxlib, XLA flags and kind of processor."""
    cpu = pathlib.Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
    key = [metadata.version("jaxlib"), os.environ["XLA_FLAGS"], platform.machine(), *features]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return home / "prumerge_jax_tests" / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]


# Threads of XLA's pool for the eight devices. By default there are eight, and a program in which
# two collectives do not depend on each other can block all, each waiting for another device.
os.environ.setdefault("NPROC", "32")

# Inherited by the programs that tests start. Every entry is kept, however fast it was compiled:
# the many small ones make up most of a first run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure(config: pytest.Config) -> None:
    """Lets xdist, where it is installed, hand out files in the order of collection."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what reads the golden data; files with slow tests come first, so none is left last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


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


MOST_MAPPINGS = 20_000
"""Memory mappings of a process, of the 65,530 that Linux grants by default, beyond which tests
drop what is compiled: every program has several, and LLVM aborts the process without more."""


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Drops compiled programs after a module that leaves too many."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax  # here, because it reads the variables above when it is first imported

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """For tests that count compilations: one that is found in the cache does not count."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    jax.config.update("jax_enable_compilation_cache", False)
    cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    cache.reset_cache()

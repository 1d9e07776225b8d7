"""Fixtures shared by the tests of the engine."""

from collections.abc import Iterator

import jax
import pytest

from prumerge_jax.models import tuning
from prumerge_jax.models.tuning import Tuning


@pytest.fixture
def reference_forms() -> Iterator[None]:
    """The reference forms, whatever the platform."""
    with tuning.use(Tuning.plain()):
        yield


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the functions compiled since the list was last cleared."""
    names: list[str] = []

    def heard(event: str, duration: float, **fields: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(fields.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield names
    jax.monitoring.unregister_event_duration_listener(heard)

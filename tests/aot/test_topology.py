"""Slices that are not there: their chips, errors, meshes on them, and which attention they get."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from prumerge_jax.aot.compile import candidates
from prumerge_jax.aot.topology import topology
from prumerge_jax.cost import CHIPS
from prumerge_jax.models.attention import backend_for
from prumerge_jax.sharding.mesh import mesh_on, use_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'prumerge_jax[tpu]'",
)


@pytest.fixture(autouse=True)
def beside_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "chip"),
    [
        ("v5e:1x1", 1, "tpu-v5e"),
        ("v5e:2x4", 8, "tpu-v5e"),
        ("v5p:2x2x2", 8, "tpu-v5p"),
        ("v6e:8x8", 64, "tpu-v6e"),
    ],
)
def test_a_slice_has_its_chips(name: str, chips: int, chip: str) -> None:
    found = topology(name)
    assert len(found.devices) == chips
    assert found.chip == CHIPS[chip]
    assert found.chip.tpu is not None


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2"])
def test_an_unknown_slice_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown topology '{name}'"):
        topology(name)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'prumerge_jax\[tpu\]'"):
        topology("v5e:2x2")


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("v6e:16x16", (4, 64, 1)), ("v6e:8x8", (1, 32, 2)), ("v5p:4x4x4", (1, 32, 2))],
)
def test_a_mesh_may_split_the_axes_of_a_torus(name: str, sizes: tuple[int, int, int]) -> None:
    devices = topology(name).devices
    assert set(mesh_on(devices, *sizes).devices.flat) == set(devices)


@pytest.mark.tpu
@needs_libtpu
def test_several_slices_are_laid_along_data() -> None:
    found = topology("2xv5e:4x4")
    assert (len(found.devices), found.chip) == (32, CHIPS["tpu-v5e"])
    mesh = mesh_on(found.devices, data=4, fsdp=8)
    assert [device.slice_index for device in mesh.devices.flat] == [0] * 16 + [1] * 16


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"])
def test_the_chips_of_every_host_make_a_mesh_of_their_own(name: str) -> None:
    """As each of several processes of `eval.py` lays out its model."""
    devices = topology(name).devices
    for host in range(4):
        own = [device for device in devices if device.process_index == host]
        assert len(own) == 4
        for sizes in ((4, 1, 1), (1, 1, 4), (2, 1, 2), (1, 4, 1), (2, 1, 1)):
            placed = mesh_on(own, *sizes).devices.flat
            assert {device.process_index for device in placed} == {host}


@pytest.mark.tpu
@needs_libtpu
def test_attention_is_that_of_the_mesh_and_not_of_this_machine() -> None:
    mesh = mesh_on(topology("v5e:2x2").devices, fsdp=4)
    with use_mesh(mesh):
        assert backend_for(jnp.bfloat16, 128) == "splash"
        assert backend_for(jnp.bfloat16, 64) == "splash"
        assert backend_for(jnp.bfloat16, 72) == "splash"
        assert backend_for(jnp.bfloat16, 60) == "xla"
    assert jax.default_backend() == "cpu"
    assert backend_for(jnp.bfloat16, 128) == "blocks"


def test_candidate_meshes_use_all_devices_and_split_ever_further() -> None:
    found = list(candidates({"data": 2, "fsdp": 4, "tensor": 1}))
    assert found == [
        {"data": 2, "fsdp": 4, "tensor": 1},
        {"data": 1, "fsdp": 8, "tensor": 1},
        {"data": 1, "fsdp": 4, "tensor": 2},
        {"data": 1, "fsdp": 2, "tensor": 4},
        {"data": 1, "fsdp": 1, "tensor": 8},
    ]
    assert list(candidates({"data": 1, "fsdp": 3, "tensor": 2})) == [
        {"data": 1, "fsdp": 3, "tensor": 2}
    ]

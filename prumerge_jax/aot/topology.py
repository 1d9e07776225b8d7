"""TPU slices to compile for without the hardware: `v5e:8x8`, or two such slices that a data centre
network joins, `2xv5e:8x8`, as abstract devices."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from prumerge_jax.cost import CHIPS, Chip


class Topology(NamedTuple):
    """A slice of a TPU pod, or several equal ones.

    Attributes:
      name: of a slice as libtpu knows it, `GENERATION:AxB` or `GENERATION:AxBxC`; `v5e:1x1` is one
        chip. In front of it the number of slices, if they are several: `2xv5e:16x16`.
      chip: peak rates of one chip; `chip.tpu` is not None.
      devices: one per chip; programs can be compiled for them and nothing else.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]


def topology(name: str) -> Topology:
    """The slice of that name, described by libtpu; no TPU is needed.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: libtpu knows no such slice, or the cost model no such chip.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu: pip install 'prumerge_jax[tpu]'"
        )
    # libtpu would ask a metadata server which TPU this machine is, and refuse a second process.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    several = re.fullmatch(r"([1-9]\d*)x(\D.*)", name)
    count, each = (int(several[1]), several[2]) if several else (1, name)
    # A host has four chips unless libtpu is told otherwise.
    is_one_chip = set(each.partition(":")[2].split("x")) == {"1"}
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if is_one_chip else {}
    if count > 1:
        options["num_slices"] = count
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=each, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"unknown topology {name!r}; expected the shape of a slice, as v5e:8x8 or v5p:4x4x4, "
            f"or of several, as 2xv5e:16x16 ({error})"
        ) from error
    kind = description.devices[0].device_kind  # type: ignore[attr-defined]
    for chip in CHIPS.values():
        if chip.tpu is not None and chip.tpu.kind == kind:
            return Topology(name, chip, tuple(description.devices))
    known = [name for name, chip in CHIPS.items() if chip.tpu is not None]
    raise ValueError(f"topology {name!r} is of chips {kind!r}; peak rates are known of {known}")

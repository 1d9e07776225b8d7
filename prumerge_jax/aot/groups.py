"""Which devices exchange data in a collective, as HLO text says it."""

import re
from collections.abc import Sequence

import numpy as np

_LIST = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)+)\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)


def groups_of(attributes: str) -> list[list[int]] | None:
    """Groups, or pairs, of partition numbers that exchange data.

    Args:
      attributes: those of an instruction: a list of groups, an array of consecutive numbers that
        is transposed and cut into groups, or axes of a mesh.

    Returns:
      None where the text says nothing, which means all devices.
    """
    if match := _LIST.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
    if match := _IOTA.search(attributes):
        return _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    if match := _MESH.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        sizes = list(axes.values())
        shape = match[2] or str(int(np.prod(sizes)))
        devices = _iota(shape, match[3]).reshape(sizes)
        along = [list(axes).index(name) for name in re.findall(r"'([^']+)'", match[4])]
        others = [axis for axis in range(len(sizes)) if axis not in along]
        count = int(np.prod([sizes[axis] for axis in along]))
        return devices.transpose(*others, *along).reshape(-1, count).tolist()
    return None


def crosses(attributes: str, slices: Sequence[int]) -> bool:
    """Whether a collective exchanges data between slices.

    Args:
      attributes: as in `groups_of`.
      slices: the slice of every partition number.
    """
    groups = groups_of(attributes)
    if groups is None:
        return len(set(slices)) > 1
    return any(len({slices[device] for device in group}) > 1 for group in groups)


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Consecutive numbers of that shape, transposed."""
    sizes = _numbers(shape)
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    return numbers if order is None else numbers.transpose(_numbers(order))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]

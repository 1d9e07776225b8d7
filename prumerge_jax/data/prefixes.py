"""Which sequences of a window begin with the same tokens, so that rows compute these once.

Everything in front of the question, system text and image, is the same for all questions about one
image; a prompt is the same for all its continuations. What is shared is one level deep: a group
has a prefix, and each member goes on alone from there.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from prumerge_jax.data.filling import Group

LEAST_SAVED = 0.1
"""Share of all tokens that sharing must save. Rows with branches take more time per token than
others."""


def find_groups(tokens: Sequence[np.ndarray], shareable: Sequence[int]) -> list[Group]:
    """Groups that save many tokens; nothing is shared where that is less than `LEAST_SAVED`.

    Args:
      tokens: int64 [T] for each sequence; equal numbers are equal tokens at equal positions.
      shareable: how many of the first tokens of each may be a prefix.

    Returns:
      Groups in the order of their first members, members in ascending order; every sequence is in
      one.
    """
    beginnings = [each[:most] for each, most in zip(tokens, shareable, strict=True)]
    groups = _by_common_prefixes(beginnings)
    saved = sum(group.prefix * (len(group.members) - 1) for group in groups)
    if saved < LEAST_SAVED * sum(len(each) for each in tokens):
        groups = []
    groups = [Group(group.prefix, tuple(sorted(group.members))) for group in groups]
    shared = {member for group in groups for member in group.members}
    groups += [Group(0, (index,)) for index in range(len(tokens)) if index not in shared]
    return sorted(groups, key=lambda group: group.members[0])


@dataclasses.dataclass
class _Branching:
    """A node of the tree of common beginnings: where sequences part.

    Attributes:
      prefix: tokens up to here.
      groups: of the sequences that go on from here.
      alone: those that are in none.
    """

    prefix: int
    groups: list[Group]
    alone: list[int]

    def take_in(self, other: "_Branching") -> None:
        """Adds what a node further on has found."""
        self.groups += other.groups
        self.alone += other.alone

    def form_group(self) -> None:
        """One group of those that are alone, and of those that save more in it than in their own.

        A group of n with a prefix of q saves (n - 1) q by itself, and n p in one of prefix p.
        """
        apart = []
        for group in self.groups:
            size = len(group.members)
            if size * self.prefix >= (size - 1) * group.prefix:
                self.alone += group.members
            else:
                apart.append(group)
        self.groups = apart
        if len(self.alone) > 1:
            self.groups.append(Group(self.prefix, tuple(self.alone)))
            self.alone = []


def _by_common_prefixes(beginnings: Sequence[np.ndarray]) -> list[Group]:
    """Groups along the tree of common beginnings, from its leaves to its root."""
    # Sequences with a common beginning are neighbours in the order of their bytes.
    keys = [np.ascontiguousarray(each, ">i8").tobytes() for each in beginnings]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [
        _common_prefix(beginnings[a], beginnings[b]) for a, b in zip(order, order[1:], strict=False)
    ]
    path = [_Branching(0, [], [])]
    for index, prefix in zip(order, [*common, 0], strict=False):
        node = _Branching(prefix, [], [index])
        while path[-1].prefix > prefix:
            closed = path.pop()
            closed.take_in(node)
            closed.form_group()
            node = _Branching(prefix, closed.groups, closed.alone)
        if path[-1].prefix < prefix:
            path.append(node)
        else:
            path[-1].take_in(node)
    return path[0].groups


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal tokens at the beginning of both."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length

"""What processes tell each other, with threads in their place."""

import numpy as np
import pytest

from prumerge_jax.sharding.agreement import gather, leader_first, require_same, together
from tests.threads import Processes, processes  # noqa: F401, a fixture


def test_one_process_asks_nobody() -> None:
    assert gather({"a": 1}) == [{"a": 1}]
    assert together(lambda: 3) == leader_first(lambda: 3) == 3
    require_same({"a": 1}, "never")


def test_every_process_learns_the_values_of_all(processes: Processes) -> None:  # noqa: F811
    ends = processes.run(3, lambda index: gather(["é" * index, index / 2, np.int64(7), None]))
    assert ends == 3 * [[["", 0.0, 7, None], ["é", 0.5, 7, None], ["éé", 1.0, 7, None]]]


def test_a_failure_of_one_is_told_by_all(processes: Processes) -> None:  # noqa: F811
    def act(index: int) -> str:
        if index == 1:
            raise OSError(2, "No such\n file", "weights")
        return "done"

    ends = processes.run(3, lambda index: together(lambda: act(index)))
    assert isinstance(ends[1], OSError)
    for other in (ends[0], ends[2]):
        assert isinstance(other, ValueError)
        assert str(other) == "process 1: [Errno 2] No such file: 'weights'"


def test_the_others_find_what_the_first_has_made(processes: Processes) -> None:  # noqa: F811
    made: list[int] = []

    def act(index: int) -> int:
        if index == 0:
            made.append(index)
        return len(made)

    assert processes.run(3, lambda index: leader_first(lambda: act(index))) == [1, 1, 1]


@pytest.mark.parametrize("failing", [0, 2])
def test_whoever_fails_all_end(processes: Processes, failing: int) -> None:  # noqa: F811
    def act(index: int) -> None:
        if index == failing:
            raise ValueError("no room")

    ends = processes.run(3, lambda index: leader_first(lambda: act(index)))
    assert str(ends[failing]) == "no room"
    others = {str(end) for index, end in enumerate(ends) if index != failing}
    assert others == {f"process {failing}: no room"}


def test_a_difference_is_named(processes: Processes) -> None:  # noqa: F811
    values = [{"seed": 1, "dtype": None}, {"seed": 1, "dtype": None}, {"seed": 2}]
    ends = processes.run(3, lambda index: require_same(values[index], "use the same flags"))
    message = "dtype is None in process 0 and 'absent' in process 2; use the same flags"
    assert [str(end) for end in ends] == 3 * [message]
    values[2]["dtype"] = None
    ends = processes.run(3, lambda index: require_same(values[index], "use the same flags"))
    assert {str(end) for end in ends} == {
        "seed is 1 in process 0 and 2 in process 2; use the same flags"
    }
    assert processes.run(2, lambda index: require_same(values[index], "x")) == [None, None]

"""Groups of devices in the three forms in which XLA writes them."""

import pytest

from prumerge_jax.aot.groups import crosses, groups_of


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (
            "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x={}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("to_apply=%sum", None),
    ],
)
def test_groups_are_read(text: str, groups: list[list[int]] | None) -> None:
    assert groups_of(text) == groups
    halves = [0] * 4 + [1] * 4
    expected = groups is None or any(min(group) < 4 <= max(group) for group in groups)
    assert crosses(text, halves) == expected
    assert not crosses(text, [0] * 8)

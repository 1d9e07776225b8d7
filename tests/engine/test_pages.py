"""Pages: given out once, never more than there are, and never so that all sequences wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prumerge_jax.engine.pages import Claim, PagePool, can_finish


def test_pages_are_free_again_when_their_last_reader_has_left() -> None:
    pool = PagePool(4)
    first = pool.take(3)
    assert sorted(first) == sorted(set(first))
    pool.share(first[:2])
    assert (pool.only_reader(first), pool.free) == (1, 1)
    pool.release(first)
    assert pool.free == 2
    pool.release(first[:2])
    assert pool.free == pool.size == 4


def test_wrong_uses_are_refused() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    with pytest.raises(ValueError, match="2 pages are wanted; 1 of 2 are free"):
        pool.take(2)
    pool.release([page])
    for use in (pool.release, pool.share):
        with pytest.raises(ValueError, match=f"page {page} is free"):
            use([page])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), st.integers(0, 20))
def test_any_order_that_finishes_is_found(claims: list[tuple[int, int]], free: int) -> None:
    def by_search(free: int, left: list[tuple[int, int]]) -> bool:
        return not left or any(
            needed <= free and by_search(free + held, left[:i] + left[i + 1 :])
            for i, (held, needed) in enumerate(left)
        )

    assert can_finish(free, [Claim(*claim) for claim in claims]) == by_search(free, claims)


def test_those_that_wait_finish_in_their_order() -> None:
    waiting = [Claim(5, 3), Claim(0, 1)]
    assert not can_finish(1, [], waiting)
    assert can_finish(1, [Claim(2, 1)], waiting)

"""Where prompts go in pages: every token once, shared pages once, what is left over copied."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data import packing
from prumerge_jax.engine.pages import PagePool
from prumerge_jax.engine.prompt_pages import PromptPages


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), page_size=st.sampled_from([1, 3, 16]))
def test_pages_hold_every_prompt_in_order(seed: int, page_size: int) -> None:
    rng = np.random.default_rng(seed)
    fronts = [rng.integers(1, 50, rng.integers(1, 20)) for _ in range(3)]
    prompts = [
        np.concatenate([fronts[rng.integers(3)], rng.integers(50, 99, rng.integers(1, 6))])
        for _ in range(int(rng.integers(1, 12)))
    ]
    (rows,) = packing.pack_window(
        [packing.Request(prompt.astype(np.int32)) for prompt in prompts],
        0,
        64,
        8,
        share_prefixes=True,
    )
    pool = PagePool(200)
    pages = PromptPages(rows, [pool], page_size)
    taken = [pages.take(place, 0) for place in range(len(prompts))]

    memory = np.full(200 * page_size, -1)
    written = pages.places >= 0
    assert len(set(pages.places[written])) == written.sum() == rows.real_tokens
    memory[pages.places[written]] = rows.ids[written]
    copies = list(pages.copies(7))
    assert bool(copies) == (rows.branch_ids is not None)
    for source, target in copies:
        assert source.shape == target.shape == (1, 7)
        real = target[0] >= 0
        assert (memory[target[0, real]] == -1).all()
        memory[target[0, real]] = memory[source[0, real]]
    for prompt, own in zip(prompts, taken, strict=True):
        held = memory.reshape(-1, page_size)[own].reshape(-1)
        np.testing.assert_array_equal(held[: len(prompt)], prompt)
        assert len(own) == -(-len(prompt) // page_size)
    for own in taken:
        pool.release(own)
    assert pool.free == pool.size


def test_full_pages_are_shared_and_the_rest_is_not() -> None:
    front = np.arange(1, 11)  # two pages of four and two tokens
    prompts = [np.append(front, [20 + i, 30 + i]).astype(np.int32) for i in range(3)]
    requests = [packing.Request(prompt) for prompt in prompts]
    (rows,) = packing.pack_window(requests, 0, 32, 1, share_prefixes=True)
    pool = PagePool(8)
    pages = PromptPages(rows, [pool], 4)
    first, second, third = (pages.take(place, 0) for place in range(3))
    assert first[:2] == second[:2] == third[:2]
    assert len({first[2], second[2], third[2]}) == 3
    assert pool.free == 8 - 2 - 3
    pool.release(first)
    assert pool.free == 4  # its own page; the others still read those of the prefix
    ((source, target),) = pages.copies(64)
    assert (target >= 0).sum() == 4  # two tokens for two branches
    assert set(source[target >= 0]) == {first[2] * 4, first[2] * 4 + 1}
    pool.release(second)
    pool.release(third)
    assert pool.free == 8
    with pytest.raises(ValueError, match="9 pages are wanted"):
        pool.take(9)

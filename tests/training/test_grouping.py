"""Batches of one modality."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.training.grouping import ModalityOrder


@settings(max_examples=40)
@given(
    images=st.integers(0, 60), texts=st.integers(0, 60), batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_an_epoch_has_every_sample_at_most_once_in_pure_batches(
    images: int, texts: int, batch: int, seed: int
) -> None:
    has_image = np.array([True] * images + [False] * texts)
    if len(has_image) < batch:
        with pytest.raises(ValueError, match="do not fill one batch"):
            ModalityOrder(has_image, batch, seed)
        return
    order = ModalityOrder(has_image, batch, seed)
    drawn = np.array([order(place) for place in range(2 * order.epoch_size)])
    for epoch in np.split(drawn, 2):
        assert len(np.unique(epoch)) == len(epoch) == len(has_image) // batch * batch
        kinds = has_image[epoch].reshape(-1, batch)
        mixed = [row for row in kinds if row.any() and not row.all()]
        # Less than one batch of either kind is left over, which makes at most one mixed batch
        # and one more of what remains.
        assert len(mixed) <= 2
        if mixed:
            pure_end = images // batch + texts // batch
            assert all((row.all() or not row.any()) for row in kinds[:pure_end])


def test_epochs_and_seeds_differ_and_repeat() -> None:
    has_image = np.arange(100) % 3 > 0
    first = ModalityOrder(has_image, 10, 0)
    again, other = ModalityOrder(has_image, 10, 0), ModalityOrder(has_image, 10, 1)
    places = range(300)
    assert [first(p) for p in places] == [again(p) for p in reversed(places)][::-1]
    assert [first(p) for p in places] != [other(p) for p in places]
    assert [first(p) for p in range(100)] != [first(p) for p in range(100, 200)]

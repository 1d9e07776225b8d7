"""From examples to micro-batches: what fits, what is counted, what is refused."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.runs import Run
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.training.batches import BatchPacker, RowShape, fit_request
from tests.training.conftest import make_examples

CAPACITY, WIDTH = 5, 4


def encoder(required: dict[int, int] | None = None, log: list[str] | None = None):
    """Image b has b % CAPACITY + 1 tokens unless `required` says otherwise."""

    def encode(pixels: np.ndarray) -> VisualTokens:
        if log is not None and not isinstance(pixels, jax.core.Tracer):
            log.append("encode")
        wanted = np.arange(len(pixels)) % CAPACITY + 1
        for row, count in (required or {}).items():
            wanted[row] = count
        return VisualTokens(
            tokens=jnp.ones((len(pixels), CAPACITY, WIDTH)),
            lengths=jnp.clip(wanted, 0, CAPACITY),
            patch_indices=jnp.full((len(pixels), CAPACITY), -1),
            required=jnp.array(wanted),
        )

    return encode


def make_packer(encode, rows: int = 4, length: int = 24) -> BatchPacker:
    return BatchPacker(encode, num_patches=16, shape=RowShape(rows, length), mesh=make_mesh())


@settings(max_examples=60)
@given(
    before=st.integers(0, 12), after=st.integers(1, 12), visual=st.integers(0, 9),
    length=st.integers(1, 24),
)  # fmt: skip
def test_a_sample_is_cut_where_its_tokens_exceed_the_row(
    before: int, after: int, visual: int, length: int
) -> None:
    ids = np.concatenate([np.arange(3, 3 + before), [IMAGE_TOKEN], np.arange(50, 50 + after)])
    ids = ids.astype(np.int32)
    labels = np.where(ids >= 50, ids, IGNORE).astype(np.int32)
    example = Example("x", np.zeros((1, 1, 3), np.uint8), True, ids, labels, False)
    if before == 0 and visual > length:
        return  # nothing fits at all; the objective refuses such a row length
    run = Run(np.arange(visual), np.arange(visual), visual)
    request = fit_request(example, run, length)
    kept = request.token_ids.size
    np.testing.assert_array_equal(request.token_ids, ids[:kept])
    np.testing.assert_array_equal(request.labels, labels[:kept])
    has_image = kept > before
    assert request.runs == ((run,) if has_image else ())
    used = kept - has_image + has_image * visual
    assert used <= length
    following = visual if kept == before else 1
    assert kept == ids.size or used + following > length


def test_counts_say_what_is_in_the_batches() -> None:
    examples = make_examples(6, image_size=8, vocabulary=90, text_only=(1,))
    (prepared,) = make_packer(encoder())([examples], 100)
    lengths = [
        e.token_ids.size + (row % CAPACITY if e.has_image else 0) for row, e in enumerate(examples)
    ]
    counts = prepared.counts
    assert prepared.samples == 106
    assert counts["samples"] == 6
    assert counts["images"] == 5
    assert counts["visual_tokens"] == 1 + 3 + 4 + 5 + 1
    assert counts["tokens"] == sum(lengths)
    assert counts["positions"] == len(prepared.batches) * 4 * 24
    assert counts["truncated_samples"] == counts["mismatched_samples"] == 0
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in prepared.batches)
    assert targets == sum(int((e.labels[1:] != IGNORE).sum()) for e in examples)


def test_too_many_samples_make_more_batches_and_long_ones_are_counted() -> None:
    examples = make_examples(9, image_size=8, vocabulary=90)
    (prepared,) = make_packer(encoder(), rows=1, length=14)([examples], 0)
    assert len(prepared.batches) > 3
    assert {batch.ids.shape for batch in prepared.batches} == {(1, 14)}
    lengths = [e.token_ids.size + row % CAPACITY for row, e in enumerate(examples)]
    assert prepared.counts["truncated_samples"] == sum(length > 14 for length in lengths) > 0


def add_a_process(
    monkeypatch: pytest.MonkeyPatch, packer: BatchPacker, other: Callable[[list[int]], list[int]]
) -> list[int]:
    """Has the packer run as one of two processes, of which the other tells what `other` makes of
    the packer's own figures; returns where those will be."""
    own: list[int] = []

    def allgather_ints(values: list[int]) -> np.ndarray:
        if len(values) == 1:  # whether there are images
            return np.array([values, values])
        own.extend(values)
        return np.array([values, other(values)])

    packer._shards = dataclasses.replace(packer._shards, representatives=(0, 1))
    monkeypatch.setattr("prumerge_jax.training.batches.allgather_ints", allgather_ints)
    return own


def test_a_process_that_needs_fewer_micro_batches_adds_empty_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = make_examples(6, image_size=8, vocabulary=90)
    packer = make_packer(encoder())
    own = add_a_process(monkeypatch, packer, lambda values: [values[0] + 2, *values[1:]])
    (prepared,) = packer([examples], 0)
    needed = own[0]
    assert len(prepared.batches) == needed + 2
    assert all((batch.segment_ids > 0).any() for batch in prepared.batches[:needed])
    for batch in prepared.batches[needed:]:
        assert not (batch.segment_ids > 0).any()
        assert (batch.targets == IGNORE).all()
        assert (batch.visual_index == -1).all()
    assert prepared.counts["samples"] == 12
    assert prepared.counts["positions"] == (needed + 2) * 4 * 24


def test_the_last_micro_batch_has_rows_as_short_as_its_samples_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prumerge_jax.training.batches.SHORTEST_ROW", 16)
    examples = make_examples(13, image_size=8, vocabulary=90)
    first, prepared = make_packer(encoder(), rows=2, length=64)([examples, examples], 0)
    assert [batch.ids.shape for batch in prepared.batches] == [(2, 64), (2, 32)]
    # The first step compiles all lengths.
    assert [batch.ids.shape[1] for batch in first.batches] == [64, 32, 16, 48]
    assert all((batch.segment_ids == 0).all() for batch in first.batches[2:])
    assert first.counts == prepared.counts
    assert prepared.counts["positions"] == 2 * (64 + 32)
    tokens = [e.token_ids.size + row % CAPACITY for row, e in enumerate(examples)]
    assert prepared.counts["tokens"] == sum(tokens)
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in prepared.batches)
    assert targets == sum(int((e.labels[1:] != IGNORE).sum()) for e in examples)


@pytest.mark.parametrize(
    ("others", "lengths"),
    [
        ((1, 48), [48]),
        ((1, 16), [32]),
        ((2, 32), [64, 32]),
        ((3, 64), [64, 64, 64]),
    ],
)
def test_the_processes_agree_on_the_length_of_the_last_micro_batch(
    monkeypatch: pytest.MonkeyPatch, others: tuple[int, int], lengths: list[int]
) -> None:
    monkeypatch.setattr("prumerge_jax.training.batches.SHORTEST_ROW", 16)
    examples = make_examples(4, image_size=8, vocabulary=90)
    packer = make_packer(encoder(), rows=2, length=64)
    own = add_a_process(monkeypatch, packer, lambda values: [*others, *values[2:]])
    (prepared,) = packer([examples], 0)
    assert own[:2] == [1, 32]
    assert [batch.ids.shape[1] for batch in prepared.batches[: len(lengths)]] == lengths
    assert {batch.ids.shape[1] for batch in prepared.batches} == {16, 32, 48, 64}
    assert prepared.counts["positions"] == 2 * sum(lengths)
    real = [int((batch.segment_ids > 0).sum()) for batch in prepared.batches]
    assert real == [prepared.counts["tokens"] // 2] + [0] * (len(real) - 1)


def test_the_next_batch_is_encoded_before_the_current_one_is_stepped() -> None:
    log: list[str] = []
    lists = [make_examples(2, image_size=8, vocabulary=90, seed=seed) for seed in range(3)]
    samples = []
    for prepared in make_packer(encoder(log=log))(lists, 0):
        log.append("step")
        samples.append(prepared.samples)
    assert log == ["encode", "encode", "step", "encode", "step", "step"]
    assert samples == [2, 4, 6]


def test_too_many_visual_tokens_and_nan_are_refused_by_name() -> None:
    examples = make_examples(3, image_size=8, vocabulary=90)
    with pytest.raises(ValueError, match="'sample 1' needs 6 visual tokens, the capacity is 5"):
        next(make_packer(encoder({1: 6}))([examples], 0))
    with pytest.raises(FloatingPointError, match="not finite on the image of sample 'sample 2'"):
        next(make_packer(encoder({2: -1}))([examples], 0))


def test_a_batch_of_text_alone_never_runs_the_tower_and_is_packed_the_same() -> None:
    texts = make_examples(4, image_size=8, vocabulary=90, text_only=(0, 1, 2, 3))
    images = make_examples(4, image_size=8, vocabulary=90, seed=1)
    ran: list[int] = []
    encode = encoder()

    def counted(pixels):
        if not isinstance(pixels, jax.core.Tracer):
            ran.append(len(pixels))
        return encode(pixels)

    packer = make_packer(counted)
    text_alone, with_images = packer([texts, images], 0)
    assert ran == [4]
    mixed = next(make_packer(encode)([[*texts[:3], images[3]]], 0))
    for batch in (*text_alone.batches, *mixed.batches):
        assert batch.visual_tokens.shape == (4, CAPACITY, WIDTH)
        assert batch.visual_tokens.dtype == with_images.batches[0].visual_tokens.dtype
    assert text_alone.counts["images"] == text_alone.counts["visual_tokens"] == 0
    (batch,) = text_alone.batches
    assert (batch.visual_index == -1).all()
    assert not batch.visual_tokens.any()
    targets = sum(int((e.labels[1:] != IGNORE).sum()) for e in texts)
    assert int((batch.targets != IGNORE).sum()) == targets

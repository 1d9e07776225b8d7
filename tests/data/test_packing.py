"""The planner: every token once, no segment split, capacity respected, deterministic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.data import filling, packing
from prumerge_jax.data.runs import Run
from prumerge_jax.data.sequences import sequence_lengths
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.data.visual_layout import CropTokens, runs

NUM_PATCHES = 20
CAPACITY = 6


def make_crops(rng, images):
    """Random counts up to the capacity; the last valid token of most images is the extra one."""
    lengths = rng.integers(0, CAPACITY + 1, images).astype(np.int32)
    patch_indices = np.full((images, CAPACITY), -1, np.int32)
    for image, length in enumerate(lengths):
        kept = max(length - int(rng.integers(0, 2)), 0)
        patch_indices[image, :kept] = rng.permutation(NUM_PATCHES)[:kept]
    return CropTokens(lengths, patch_indices, NUM_PATCHES)


def make_requests(rng, count, crops, images_of):
    """Requests, and the rows of each one's images."""
    requests, rows = [], []
    for index in range(count):
        images = images_of(index)
        token_ids = rng.integers(1, 1000, rng.integers(1, 9)).astype(np.int32)
        for place in rng.integers(0, token_ids.size + 1, len(images)):
            token_ids = np.insert(token_ids, place, IMAGE_TOKEN)
        labels = None
        if rng.random() < 0.8:
            masked = (rng.random(token_ids.size) < 0.5) | (token_ids == IMAGE_TOKEN)
            labels = np.where(masked, IGNORE, token_ids).astype(np.int32)
        requests.append(packing.Request(token_ids, runs(crops, images), labels))
        rows.append(images)
    return requests, rows


def expand_by_hand(request, images, crops, position_ids):
    """(ids, visual_index, positions, targets) of one request, one token at a time."""
    ids, visual_index, positions, labels = [], [], [], []
    images = iter(images)
    request_labels = request.labels
    if request_labels is None:
        request_labels = np.full(request.token_ids.size, IGNORE)
    position = 0
    for token, label in zip(request.token_ids, request_labels, strict=True):
        if token != IMAGE_TOKEN:
            ids.append(token)
            visual_index.append(-1)
            positions.append(position)
            labels.append(label)
            position += 1
            continue
        image = next(images)
        for slot in range(crops.lengths[image]):
            ids.append(0)
            visual_index.append(image * crops.capacity + slot)
            labels.append(IGNORE)
            patch = crops.patch_indices[image, slot]
            place = crops.num_patches - 1 if patch == -1 else patch
            positions.append(position + (slot if position_ids == "compact" else place))
        position += crops.lengths[image] if position_ids == "compact" else crops.num_patches
    return ids, visual_index, positions, [*labels[1:], IGNORE]


def assert_filled_by_hand(batches, requests, images, crops, position_ids):
    """Each request is placed completely, its own tokens once, where its rows say; the rest is
    padding."""
    seen = np.concatenate([rows.requests for rows in batches]) if batches else np.zeros(0)
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(requests)))
    for rows in batches:
        covered, prefixes = np.zeros_like(rows.ids), np.zeros_like(rows.ids)
        latest = dict.fromkeys(range(len(rows.ids)), 0)
        branches = rows.segment_ids * 0 if rows.branch_ids is None else rows.branch_ids
        places = zip(
            rows.row_of, rows.start_of, rows.length_of, rows.prefix_start_of,
            rows.prefix_length_of, rows.requests, strict=True,
        )  # fmt: skip
        for row, start, length, prefix_start, prefix_length, request in sorted(places):
            own = np.arange(start, start + length)
            prefix = np.arange(prefix_start, prefix_start + prefix_length)
            covered[row, own] += 1
            prefixes[row, prefix] = 1
            where = np.s_[row, np.concatenate([prefix, own])]
            expected = expand_by_hand(requests[request], images[request], crops, position_ids)
            for field, values in zip(
                ("ids", "visual_index", "positions", "targets"), expected, strict=True
            ):
                np.testing.assert_array_equal(getattr(rows, field)[where], values, err_msg=field)
            (segment,) = set(rows.segment_ids[where])
            assert segment - latest[row] in ((0, 1) if prefix_length else (1,))
            latest[row] = segment
            (branch,) = set(branches[row, own])
            assert (branch > 0) == (prefix_length > 0)
            of_branch = (rows.segment_ids[row] == segment) & (branches[row] == branch)
            np.testing.assert_array_equal(np.flatnonzero(of_branch), own)
            if prefix_length:
                of_branch = (rows.segment_ids[row] == segment) & (branches[row] == 0)
                np.testing.assert_array_equal(np.flatnonzero(of_branch), prefix)
        np.testing.assert_array_equal(covered + prefixes, rows.segment_ids > 0)
        padding = rows.segment_ids == 0
        assert not rows.ids[padding].any()
        assert not rows.positions[padding].any()
        assert not branches[padding].any()
        assert (rows.visual_index[padding] == -1).all()
        assert (rows.targets[padding] == IGNORE).all()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    num_rows=st.integers(1, 3),
    shards=st.integers(1, 3),
    position_ids=st.sampled_from(["compact", "original"]),
)
def test_packed_window_holds_every_token_once_on_its_shard(
    seed, count, num_rows, shards, position_ids
):
    rng = np.random.default_rng(seed)
    num_images = 4 * shards
    crops = make_crops(rng, num_images)

    def images_of(index):
        shard = index % shards
        return (rng.integers(0, 4, rng.integers(0, 3)) + 4 * shard).tolist()

    requests, images = make_requests(rng, count, crops, images_of)
    row_length, num_rows = 24, num_rows * shards
    arguments = (requests, crops.num_slots, row_length, num_rows)
    options = dict(shards=shards, position_ids=position_ids, carried_over=int(rng.integers(0, 5)))
    batches = packing.pack_window(*arguments, **options)

    assert_filled_by_hand(batches, requests, images, crops, position_ids)
    for rows in batches:
        assert rows.ids.shape == (num_rows, row_length)
        for field in ("ids", "visual_index", "positions", "segment_ids", "targets"):
            assert getattr(rows, field).dtype == np.int32
        row, column = np.nonzero(rows.visual_index >= 0)
        image = rows.visual_index[row, column] // CAPACITY
        np.testing.assert_array_equal(image * shards // num_images, row * shards // num_rows)
    again = packing.pack_window(*arguments, **options)
    for rows, same in zip(batches, again, strict=True):
        for field, values in vars(rows).items():
            np.testing.assert_array_equal(values, getattr(same, field), err_msg=field)


any_lengths = given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    slack=st.integers(0, 20),
    carried_over=st.integers(0, 60),
)


@settings(max_examples=100)
@any_lengths
def test_rows_hold_all_once_and_as_much_beside_the_longest_as_there_is(
    lengths, slack, carried_over
):
    row_length = max(lengths, default=1) + slack
    rows = filling.fill_rows(lengths, row_length, carried_over=carried_over)
    assert rows == filling.fill_rows(lengths, row_length, carried_over=carried_over)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for number, row in enumerate(rows):
        free = row_length - sum(lengths[index] for index in row)
        assert 0 <= free < row_length
        later = [index for other in rows[number + 1 :] for index in other]
        assert all(lengths[index] > free for index in later)
        carried = [index for index in row if index < carried_over]
        others = [index for index in row + later if index >= carried_over]
        room = row_length - sum(lengths[index] for index in carried)
        fitting = [index for index in others if lengths[index] <= room]
        if fitting:
            longest = min(fitting, key=lambda index: (-lengths[index], index))
            assert longest in row
            sums = {0}
            for index in set(others) - {longest}:
                sums |= {total + lengths[index] for total in sums}
            room -= lengths[longest]
            assert room - free == max(total for total in sums if total <= room)


@settings(max_examples=100)
@any_lengths
def test_those_carried_over_stand_where_they_would_among_themselves(lengths, slack, carried_over):
    """First-fit-decreasing of those carried over alone, as in the textbook."""
    row_length = max(lengths, default=1) + slack
    rows, free = [], []
    for length, index in sorted(
        (-length, index) for index, length in enumerate(lengths[:carried_over])
    ):
        row = next((row for row, room in enumerate(free) if room >= -length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(row_length)
        rows[row].append(index)
        free[row] += length
    packed = filling.fill_rows(lengths, row_length, carried_over=carried_over)
    found = [[index for index in row if index < carried_over] for row in packed]
    assert found[: len(rows)] == rows
    assert not any(found[len(rows) :])


def realistic_window(seed):
    """1,000 images: lognormal visual counts with mean 40 (sigma .45), text N(60, 15)."""
    rng = np.random.default_rng(seed)
    mean, sigma, count, capacity = 40, 0.45, 1000, 160
    visual = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    lengths = np.clip(np.round(visual), 2, capacity).astype(np.int32)
    crops = CropTokens(lengths, np.full((count, capacity), -1, np.int32), 576)
    text = np.clip(np.round(rng.normal(60, 15, count)), 25, 140).astype(int)
    requests = [
        packing.Request(np.array([1, IMAGE_TOKEN] + [5] * (tokens - 1)), (image,))
        for image, tokens in zip(runs(crops, range(count)), text, strict=True)
    ]
    return requests, crops


@pytest.mark.parametrize("seed", range(3))
def test_realistic_window_takes_the_fewest_rows(seed):
    requests, crops = realistic_window(seed)
    batches = packing.pack_window(requests, crops.num_slots, row_length=1024, num_rows=4)
    real = sequence_lengths(requests).sum()
    computed = sum(rows.ids.size for rows in batches)
    used = [(rows.segment_ids > 0).any(axis=1) for rows in batches]
    assert 1024 * np.sum(used) - real < 1024  # no packing takes fewer rows
    assert real / computed >= 0.95


def make_run(index, offset=None, span=16):
    index = np.array(index, np.int32)
    offset = np.zeros_like(index) if offset is None else np.array(offset, np.int32)
    return Run(index, offset, span)


def test_requests_beyond_a_batch_fill_another():
    requests = [packing.Request(np.full(6, 7, np.int32)) for _ in range(4)]
    (rows,) = packing.pack_window(requests, 0, row_length=12, num_rows=2)
    np.testing.assert_array_equal(rows.requests, np.arange(4))
    assert rows.segment_ids.tolist() == [[1] * 6 + [2] * 6] * 2
    assert len(packing.pack_window(requests, 0, row_length=12, num_rows=1)) == 2


def test_requests_without_image_fill_the_emptiest_shard():
    with_image = packing.Request(np.array([1, IMAGE_TOKEN]), (make_run(range(6)),))
    text = [packing.Request(np.full(3, 7)) for _ in range(4)]
    (rows,) = packing.pack_window([with_image, *text], 12, 10, 2, shards=2)
    assert rows.row_of.tolist() == [0, 1, 1, 1, 0]
    newlines = packing.Request(np.array([1, IMAGE_TOKEN]), (make_run([packing.NEWLINE] * 2),))
    (rows,) = packing.pack_window([with_image, newlines], 12, 10, 2, shards=2)
    assert rows.row_of.tolist() == [0, 1]


def test_causal_targets_cross_neither_segments_nor_visual_tokens():
    token_ids = np.array([1, IMAGE_TOKEN, 11, 12])
    labels = np.array([IGNORE, IGNORE, 11, 12])
    requests = [packing.Request(token_ids, (make_run([0, 1], [3, 8], span=9),), labels)] * 2
    (rows,) = packing.pack_window(requests, 2, 12, 1, position_ids="original")
    ignore = IGNORE
    assert rows.ids.tolist() == [[1, 0, 0, 11, 12] * 2 + [0, 0]]
    assert rows.visual_index.tolist() == [[-1, 0, 1, -1, -1] * 2 + [-1, -1]]
    assert rows.positions.tolist() == [[0, 4, 9, 10, 11] * 2 + [0, 0]]
    assert rows.targets.tolist() == [[ignore, ignore, 11, 12, ignore] * 2 + [ignore, ignore]]


@pytest.mark.parametrize(
    ("position_ids", "positions"),
    [("compact", [0, 1, 2, 3, 4, 5, 6]), ("original", [0, 3, 1, 7, 14, 15, 34])],
)
def test_a_run_stands_as_it_is_newlines_and_empty_ones_included(position_ids, positions):
    image = make_run([7, 2, packing.NEWLINE], [2, 0, 6], span=12)
    empty, last = make_run([], span=1), make_run([0, packing.NEWLINE], [0, 1], span=20)
    token_ids = np.array([5, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 6])
    request = packing.Request(token_ids, (image, empty, last))
    (rows,) = packing.pack_window([request], 8, 9, 1, position_ids=position_ids)
    newline = packing.NEWLINE
    assert rows.visual_index.tolist() == [[-1, 7, 2, newline, 0, newline, -1, -1, -1]]
    assert rows.ids.tolist() == [[5, 0, 0, 0, 0, 0, 6, 0, 0]]
    assert rows.positions.tolist() == [[*positions, 0, 0]]


def test_faults_name_the_request_and_what_was_expected():
    image = packing.Request(np.array([1, IMAGE_TOKEN, 2]), (make_run(range(4)),))
    too_long = packing.Request(np.full(9, 7))
    with pytest.raises(ValueError, match="request 1 has 9 tokens; expected 1 to 8"):
        packing.pack_window([image, too_long], 8, 8, 2)
    for slot in (8, -1, -3):
        stray = packing.Request(image.token_ids, (make_run([3, slot]),))
        with pytest.raises(ValueError, match=f"request 1 refers to visual token slot {slot}; .* 8"):
            packing.pack_window([image, stray], 8, 8, 2)
    both = packing.Request(np.array([IMAGE_TOKEN] * 2), (make_run([1]), make_run([4])))
    with pytest.raises(ValueError, match="request 0 has visual tokens on shards 0 to 1"):
        packing.pack_window([both], 8, 8, 2, shards=2)
    with pytest.raises(ValueError, match="num_rows 3 is not a positive multiple of 2"):
        packing.pack_window([image], 8, 8, 3, shards=2)
    with pytest.raises(ValueError, match="9 visual token slots do not divide into 2 shards"):
        packing.pack_window([image], 9, 8, 2, shards=2)
    with pytest.raises(ValueError, match="position_ids is 'sparse'"):
        packing.pack_window([image], 8, 8, 2, position_ids="sparse")
    with pytest.raises(ValueError, match="2 image placeholders .* for 1 images"):
        packing.Request(np.array([IMAGE_TOKEN] * 2), (make_run([0]),))
    with pytest.raises(ValueError, match="labels has shape"):
        packing.Request(np.array([1, 2]), labels=np.array([1]))
    with pytest.raises(ValueError, match=r"index \(2,\) and offset \(1,\)"):
        make_run([0, 1], [0])

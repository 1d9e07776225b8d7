"""Samples with several crops and videos in micro-batches: which token stands where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.data.anyres import Window
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.pictures import Picture
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.sharding.mesh import make_mesh, use_mesh
from prumerge_jax.training.batches import RowShape
from prumerge_jax.training.crops import CropCapacity, CropPacker
from tests.conftest import require_eight_devices

SLOTS = 4


def encoder(offset: int):
    """Two tokens for a crop: its first pixel plus `offset`, and that plus a half."""

    def encode(crops: jax.Array, of_crops: jax.Array) -> VisualTokens:
        level = jnp.asarray(crops)[:, 0, 0, 0].astype(jnp.float32) + offset
        tokens = jnp.zeros((len(crops), SLOTS, 1)).at[:, 0, 0].set(level)
        tokens = tokens.at[:, 1, 0].set(level + 0.5)
        counts = jnp.full((len(crops),), 2, jnp.int32)
        patches = jnp.tile(jnp.array([0, 3, -1, -1], jnp.int32), (len(crops), 1))
        return VisualTokens(tokens, counts, patches, counts)

    return encode


def packer(per_sample: int, shards: int = 1) -> CropPacker:
    capacity = CropCapacity(
        per_sample,
        side=2,
        num_patches=4,
        cls=False,
        reduction=reductions.parse("select-only"),
        interpolates=False,
    )
    return CropPacker(
        [encoder(0), encoder(1000)],
        capacity=capacity,
        shape=RowShape(2, 24),
        mesh=make_mesh(data=shards),
    )


def picture(first: int, crops: int, *, video: bool) -> Picture:
    pixels = np.zeros((crops, 2, 2, 3), np.uint8)
    pixels += np.arange(first, first + crops, dtype=np.uint8)[:, None, None, None]
    layout = Layout(2, frames=crops, pooled=2) if video else Layout(2, (1, crops - 1))
    return Picture(pixels, layout if crops > 1 or video else Layout(2))


def sample(name: int, *pictures: Picture) -> Example:
    ids = np.array([5, *[IMAGE_TOKEN] * len(pictures), 6, 7], np.int32)
    labels = np.where(ids == 7, ids, IGNORE).astype(np.int32)
    none = np.zeros((0, 0, 3), np.uint8)
    return Example(f"sample {name}", none, bool(pictures), ids, labels, False, tuple(pictures))


SAMPLES = [
    sample(0, picture(10, 3, video=False)),
    sample(1, picture(20, 1, video=False), picture(30, 2, video=True)),
    sample(2),
    sample(3, picture(40, 3, video=True)),
]
EXPECTED = [
    [10, 10.5, 11, 11.5, 12, 12.5],
    [20, 20.5, 1030, 1030.5, 1031, 1031.5],
    [],
    [1040, 1040.5, 1041, 1041.5, 1042, 1042.5],
]


@pytest.mark.parametrize("shards", [1, 2])
def test_every_sample_reads_the_tokens_of_its_crops(shards: int) -> None:
    require_eight_devices()
    feed = packer(4, shards)
    with use_mesh(make_mesh(data=shards)):
        (batch,) = feed([SAMPLES], 0)
    assert batch.counts["visual_tokens"] == 18
    assert batch.counts["images"] == 3
    found = []
    for rows in batch.batches:
        tokens = np.asarray(rows.visual_tokens).reshape(-1)
        index, segments = np.asarray(rows.visual_index), np.asarray(rows.segment_ids)
        for row in range(len(index)):
            for segment in np.unique(segments[row][segments[row] > 0]):
                of_sample = index[row][segments[row] == segment]
                found.append(tokens[of_sample[of_sample >= 0]].tolist())
    assert sorted(found) == sorted(EXPECTED)


def test_more_crops_than_there_is_room_for_are_refused_with_the_number() -> None:
    message = (
        "the samples of a batch from 'sample 0' on have up to 5 crops or frames on a data shard, "
        "there is room for 4; set config.crops_per_sample to at least 2"
    )
    with use_mesh(make_mesh()), pytest.raises(ValueError, match=message):
        list(packer(1)([SAMPLES], 0))


def test_an_image_that_does_not_fit_is_dropped_with_what_follows() -> None:
    long = sample(0, picture(10, 9, video=True), picture(20, 9, video=True))
    with use_mesh(make_mesh()):
        (batch,) = packer(20)([[long]], 0)
    (rows,) = batch.batches
    assert batch.counts["truncated_samples"] == 1
    assert (np.asarray(rows.visual_index) >= 0).sum() == 18


def test_crops_that_share_their_images_tokens_are_cut_to_their_shares() -> None:
    """Of two tiles the second has all content; tokens come in the order of their patches."""

    def encode(crops: jax.Array, on_image: jax.Array) -> VisualTokens:
        visual = encoder(0)(crops, on_image)
        content = jnp.tile(jnp.array([0, 1, 0, 1], jnp.float32), (len(crops), 1))
        return visual._replace(patch_indices=visual.patch_indices[:, [1, 0, 2, 3]], content=content)

    capacity = CropCapacity(
        per_sample=3,
        side=2,
        num_patches=4,
        cls=False,
        reduction=reductions.parse("hired:tokens=1").for_crops(3),
        interpolates=False,
    )
    feed = CropPacker([encode], capacity=capacity, shape=RowShape(2, 24), mesh=make_mesh())
    tiled = picture(10, 3, video=False)
    tiled = tiled._replace(layout=dataclasses.replace(tiled.layout, window=Window(0, 2, 0, 4)))
    with use_mesh(make_mesh()):
        (batch,) = feed([[sample(0, tiled)]], 0)
    (rows,) = batch.batches
    index = np.asarray(rows.visual_index)
    shown = np.asarray(rows.visual_tokens).reshape(-1)[index[index >= 0]]
    assert shown.tolist() == [10, 12.5, 12]

"""Batches that are encoded in parts: the same as at once, and no more than is there."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax.sharding.mesh import make_mesh, use_mesh
from prumerge_jax.sharding.processes import to_global_array
from prumerge_jax.training.objectives.next_token import ImageEncoder
from prumerge_jax.training.parts import CROPS_AT_A_TIME, EncoderInParts
from tests.conftest import require_eight_devices
from tests.training.bench import Bench, lora_config


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), share=st.floats(0, 1), shards=st.sampled_from([1, 2, 8]))
def test_no_more_parts_are_encoded_than_are_used(rows: int, share: float, shards: int) -> None:
    require_eight_devices()
    used = round(share * rows)
    sizes = []

    def encode(crops: jax.Array, marks: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not isinstance(crops, jax.core.Tracer):
            sizes.append(len(crops))
        return crops[:, 0, 0].astype(np.float32) + 1, marks.sum(1)

    crops = np.arange(shards * rows * 3, dtype=np.int32).reshape(-1, 1, 1, 3)
    marks = np.arange(shards * rows * 2, dtype=np.int32).reshape(-1, 2)
    first, second = EncoderInParts(encode, make_mesh(data=shards))(crops, marks, used=used)
    size = min(rows, CROPS_AT_A_TIME)
    parts = -(-used // size)
    there = (np.arange(shards * rows) % rows < parts * size)[:, None]
    np.testing.assert_array_equal(first, np.where(there, crops[:, 0, 0] + 1, 0))
    np.testing.assert_array_equal(second, np.where(there[:, 0], marks.sum(1), 0))
    assert sizes == [shards * size] * parts


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_parts_of_a_batch_have_the_tokens_of_the_batch(mesh: tuple[int, int, int]) -> None:
    require_eight_devices()
    bench = Bench(lora_config(), mesh)
    side = bench.model.vision.image_size
    shards = bench.mesh.shape["data"] * bench.mesh.shape["fsdp"]
    pixels = np.random.default_rng(0).integers(0, 256, (shards * 37, side, side, 3), np.uint8)
    with use_mesh(bench.mesh):
        encode = ImageEncoder(bench.config, bench.frozen, bench.mesh)
        at_once = encode(to_global_array(pixels, bench.mesh))
        in_parts = EncoderInParts(encode, bench.mesh)(pixels, used=37)
    np.testing.assert_array_equal(in_parts.patch_indices, at_once.patch_indices)
    np.testing.assert_array_equal(in_parts.lengths, at_once.lengths)
    np.testing.assert_allclose(in_parts.tokens, at_once.tokens, rtol=1e-5, atol=1e-5)
    assert in_parts.tokens.sharding == at_once.tokens.sharding

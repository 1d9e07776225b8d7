"""HiRED on LLaVA-NeXT: the patches that images of several crops keep, against a NumPy loop."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import sharding
from prumerge_jax.data.images import normalize
from prumerge_jax.data.layout import Layout
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.explanations import explain_crops
from prumerge_jax.engine.request import ImageInput, Request
from prumerge_jax.engine.shapes import EngineShapes
from tests.conftest import require_eight_devices
from tests.families import GoldenModel, engine_of, engine_on, golden_model

SHAPES = EngineShapes(
    batch_size=4,
    window_size=16,
    row_length=128,
    longest_prompt=128,
    prefill_rows=2,
    slots=4,
    cache_length=128,
    decode_steps_per_call=4,
)
# 1 x 2 tiles, of which the image fills the middle; 1 x 3, 2 x 2 with and without edges, 3 x 1.
CASES = ["square_56", "wide_333x77", "wide_97x61", "odd_151x149", "tall_41x200"]
ALONE = len(CASES)
"""Key of the request whose image is one crop."""
pytestmark = pytest.mark.usefixtures("reference_forms")
load = functools.partial(golden_model, name="next_vicuna")
make_engine = functools.partial(engine_of, base=SHAPES)


def requests_of(model: GoldenModel) -> list[Request]:
    """One for each case, and one whose image is one crop."""
    requests = [model.request(key, case) for key, case in enumerate(CASES)]
    crops = requests[0].images[0].crops[:1]
    alone = (ImageInput(crops, key="alone"),)
    return [*requests, dataclasses.replace(requests[0], key=ALONE, images=alone)]


def tower_attention(model: GoldenModel, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[C, H, N] float64, attention of CLS in the first layer and in the one whose output is used;
    a CLIP tower in NumPy."""
    vision, config = model.model.vision, model.config.vision
    layers = jax.tree.map(lambda w: np.asarray(w, np.float64), nnx.to_pure_dict(nnx.state(vision)))

    def norm(x: np.ndarray, weights: dict) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * weights["scale"] + weights["bias"]

    patch, grid = config.patch_size, config.grid
    pixels = normalize(crops).astype(np.float64)
    x = np.stack(
        [
            np.tensordot(pixels[:, r : r + patch, c : c + patch], kernel, 3)
            for kernel in [layers["patch_embedding"]["kernel"]]
            for r in range(0, grid * patch, patch)
            for c in range(0, grid * patch, patch)
        ],
        axis=1,
    )
    cls = np.broadcast_to(layers["class_embedding"], (len(x), 1, config.width))
    x = np.concatenate([cls, x], axis=1) + layers["position_embedding"]
    x = norm(x, layers["pre_layernorm"])
    found = []
    for number in range(config.num_layers - 1):
        of = jax.tree.map(lambda w, number=number: w[number], layers["layers"])
        seen = norm(x, of["layer_norm1"])
        q, k, v = (
            (seen @ of["self_attn"][name]["kernel"] + of["self_attn"][name]["bias"])
            .reshape(*x.shape[:2], config.num_heads, -1)
            .swapaxes(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = np.exp(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5)
        weights /= weights.sum(-1, keepdims=True)
        found.append(weights[:, :, 0, 1:])
        out = (weights @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + out @ of["self_attn"]["out_proj"]["kernel"] + of["self_attn"]["out_proj"]["bias"]
        seen = norm(x, of["layer_norm2"]) @ of["mlp"]["fc1"]["kernel"] + of["mlp"]["fc1"]["bias"]
        seen = seen / (1 + np.exp(-1.702 * seen))
        x = x + seen @ of["mlp"]["fc2"]["kernel"] + of["mlp"]["fc2"]["bias"]
    return found[0], found[-1]


def kept_patches(
    model: GoldenModel, image: ImageInput, tokens: int, alpha: float
) -> list[list[int]]:
    """The patches of every crop, as section 4 of the paper has it."""
    layout = image.layout or Layout(model.config.vision.grid)
    first, late = (each.sum(1) for each in tower_attention(model, image.crops))
    num_patches, total = late.shape[1], len(late) * tokens
    shares = [min(int(total * alpha), num_patches)]
    if len(late) == 1:
        shares = [tokens]
    else:
        ranked = sorted(range(num_patches), key=lambda patch: -first[0, patch])
        counts = dict.fromkeys(np.ndindex(*layout.tiles), 0)
        for patch in ranked[: int(num_patches * (1 - alpha))]:
            row, column = np.divmod(patch, layout.grid)
            row = layout.window.top + (row + 0.5) / layout.grid * layout.window.rows
            column = layout.window.left + (column + 0.5) / layout.grid * layout.window.columns
            counts[int(row // layout.grid), int(column // layout.grid)] += 1
        content = sum(counts.values())
        for count in counts.values():
            shares.append(min(count * (total - shares[0]) // content, num_patches))
    assert sum(shares) <= total
    on_image = layout.on_image()
    return [
        sorted(sorted(np.flatnonzero(on_image[crop]), key=lambda p: -late[crop, p])[:share])
        for crop, share in enumerate(shares)
    ]


def runs_of(engine: Engine, requests: Sequence[Request]) -> dict[int, tuple]:
    """For every request the positions of its image's tokens, and the tokens."""
    found = {}
    for window in engine.planner(engine.counters).windows([list(requests)]):
        pool = np.asarray(window.pool).reshape(-1, window.pool.shape[-1])
        for request, planned in zip(window.requests, window.planned, strict=True):
            (run,) = planned.runs
            found[request.key] = (run.offset, pool[run.index])
    return found


@pytest.mark.parametrize(("tokens", "alpha"), [(5, 0.5), (3, 0.25)])
def test_kept_patches_are_the_papers(golden: pathlib.Path, tokens: int, alpha: float):
    """Of images of one crop, and of two to four tiles, in whatever batches."""
    model, requests = load(golden), requests_of(load(golden))
    spelling = f"hired:tokens={tokens},alpha={alpha}"
    engine = make_engine(model, spelling)
    found = runs_of(engine, requests)
    in_small_batches = runs_of(make_engine(model, spelling, batch_size=2, window_size=6), requests)
    crops = kept = 0
    for request in requests:
        (image,) = request.images
        patches = kept_patches(model, image, tokens, alpha)
        layout = image.layout or Layout(model.config.vision.grid)
        positions = layout.positions()
        expected = [positions[crop, patch] for crop, own in enumerate(patches) for patch in own]
        np.testing.assert_array_equal(found[request.key][0], expected)
        np.testing.assert_array_equal(in_small_batches[request.key][0], expected)
        tokens_of = (each[request.key][1] for each in (found, in_small_batches))
        np.testing.assert_allclose(*tokens_of, atol=1e-5)
        crops, kept = crops + layout.num_crops, kept + len(expected)
    assert (engine.counters.crops, engine.counters.visual_tokens) == (crops, kept)
    assert kept <= tokens * crops


def test_what_is_shown_is_what_is_kept(golden: pathlib.Path):
    model = load(golden)
    engine = make_engine(model, "hired:tokens=5")
    picture = model.processor(model.image("wide_97x61"))
    explained = explain_crops(engine.model, picture, engine.reduction, question_ids=None)
    expected = kept_patches(model, ImageInput(*picture), 5, 0.5)
    assert [each.patch_indices.tolist() for each in explained] == expected
    for each in explained:
        kept = np.flatnonzero(each.assignment >= 0)
        np.testing.assert_array_equal(kept, each.patch_indices)
        np.testing.assert_array_equal(each.assignment[kept], np.arange(len(kept)))


def test_merging_over_crops_is_refused(golden: pathlib.Path):
    model = load(golden)
    engine = make_engine(model, "hired:tokens=5,merge=mean")
    (window,) = engine.planner(engine.counters).windows([[model.request(0, "wide_97x61")]])
    assert "hired:tokens=5,merge=mean shares a fixed number of unmerged tokens out" in str(
        window.failed[0].error
    )


@pytest.mark.slow
def test_a_mesh_equals_one_device(golden: pathlib.Path):
    require_eight_devices()
    model, requests = load(golden), requests_of(load(golden))
    plain = make_engine(model, "hired:tokens=5", window_size=32)
    mesh = sharding.make_mesh(2, 2, 2)
    engine = engine_on(mesh, plain, prefill_rows=4)
    expected = runs_of(plain, requests)
    with sharding.use_mesh(mesh):
        found = runs_of(engine, requests)
    for key, (positions, tokens) in expected.items():
        np.testing.assert_array_equal(found[key][0], positions)
        np.testing.assert_allclose(found[key][1], tokens, atol=5e-5, rtol=5e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compilation_cache")
def test_nothing_compiles_after_warm_up(golden: pathlib.Path, compiled: list[str]):
    model, requests = load(golden), requests_of(load(golden))
    engine = make_engine(model, "hired:tokens=5")
    engine.warm_up()
    compiled.clear()
    answers = list(engine.generate(requests))
    assert [answer.error for answer in answers] == [None] * len(requests)
    assert compiled == []

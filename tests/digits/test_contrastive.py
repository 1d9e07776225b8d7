"""The contrastive loss and its windows."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs.digits import contrastive as stage_config
from prumerge_jax import prumerge
from prumerge_jax.data import images, samples
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import captions
from prumerge_jax.digits import dataset as digits_vqa
from prumerge_jax.digits import scenes as digits
from prumerge_jax.digits.contrastive import (
    CaptionBatch,
    ContrastiveConfig,
    contrastive_loss,
    contrastive_module,
    scale_cls_queries,
)
from prumerge_jax.models.config import TextConfig, VisionConfig
from prumerge_jax.models.llava import normalize_pixels
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.training.config import parse
from prumerge_jax.training.inputs import TrainingSource

VISION = VisionConfig(
    image_size=96, patch_size=8, width=16, mlp_width=16, num_layers=2, num_heads=2
)
TEXT = TextConfig(
    vocab_size=384, width=16, mlp_width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
    max_positions=24,
)  # fmt: skip
CONFIG = ContrastiveConfig(TEXT, width=8, group=4)


@pytest.fixture(scope="module")
def weights() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = contrastive_module(VISION, CONFIG).shapes()
    return {
        path: jnp.asarray(0.3 * rng.normal(size=shape.shape), jnp.float32)
        for path, shape in sorted(shapes.items())
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    config = stage_config.get_config("tiny")
    config.data.directory = str(tmp_path_factory.mktemp("data"))
    config.batch_size, config.steps = 16, 10
    config.objective_options.curriculum = ((1, 0.3, 2), (2, 0.2, 1), (3, 0.5, 1))
    return config


@pytest.fixture(scope="module")
def records(config: ml_collections.ConfigDict) -> list[dict]:
    builder = samples.prepare(
        digits_vqa.DigitsVqa,
        digits_vqa.DigitsVqaConfig(train_scenes=64, validation_scenes=8, test_scenes=8),
        config.data.directory,
    )
    source = samples.record_source(builder, "train")
    return [source[index] for index in range(64)]


def open_windows(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> TrainingSource:
    options = config.objective_options
    curriculum = captions.Curriculum(options.group, tuple(options.curriculum))
    return captions.open_windows(parse(config), tokenizer, VISION, curriculum)


def test_loss_is_info_nce_over_groups_with_equal_captions_as_positives(weights) -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 300, (8, 24)).astype(np.int32)
    ids[1] = ids[0]  # same caption, same group
    ids[4] = ids[0]  # same caption, other group
    lengths = np.full(8, 24, np.int32)
    lengths[2] = 9
    pixels = rng.integers(0, 256, (8, 96, 96, 3), np.uint8)
    patches = np.broadcast_to(np.arange(144, dtype=np.int32), (8, 144))
    batch = CaptionBatch(pixels, patches, ids, lengths)

    @jax.jit
    def run(weights, batch):
        model = contrastive_module(VISION, CONFIG).merge(weights)
        return (
            contrastive_loss(weights, batch, vision=VISION, config=CONFIG),
            model.embed_images(batch.pixels),
            model.embed_captions(batch.ids, batch.lengths),
        )

    (loss, count), vectors, texts = run(weights, batch)
    vectors, texts = np.asarray(vectors, np.float64), np.asarray(texts, np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    scores = vectors @ texts.T / np.exp(float(weights["log_temperature"]))
    expected = 0.0
    for group in (range(4), range(4, 8)):
        for a in group:
            positive = [b for b in group if (ids[b] == ids[a]).all()]
            for row in (scores[a], scores[:, a]):
                share = np.exp(row[positive]).sum() / np.exp(row[list(group)]).sum()
                expected -= np.log(share) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(count) == 8


def test_image_embedding_is_pooled_by_prumerges_attention(weights) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (1, 96, 96, 3), np.uint8)

    @jax.jit
    def run(weights, pixels):
        model = contrastive_module(VISION, CONFIG).merge(weights)
        features = model.vision(normalize_pixels(pixels, VISION))
        attention = prumerge.cls_attention(features.queries[:, 0], features.keys)[0]
        values = model.value(model.vision.last.layer_norm1(features.hidden[:, 1:]))[0]
        pooled = model.image_out((attention[:, None] * values).sum(0))
        return model.embed_images(pixels)[0], pooled / jnp.linalg.norm(pooled)

    np.testing.assert_allclose(*run(weights, pixels), atol=1e-5)


def test_a_sharpened_tower_attends_as_a_power_and_sees_the_same(weights) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (2, 96, 96, 3), np.uint8)

    @jax.jit
    def run(weights, pixels):
        model = contrastive_module(VISION, CONFIG).merge(weights)
        features = model.vision(normalize_pixels(pixels, VISION))
        return features.hidden, prumerge.cls_attention(features.queries[:, 0], features.keys)

    hidden, attention = map(np.asarray, run(weights, pixels))
    changed = scale_cls_queries(weights, 3.0)
    hidden_sharp, sharp = map(np.asarray, run(changed, pixels))
    np.testing.assert_array_equal(hidden_sharp, hidden)
    everything = np.column_stack([attention, 1 - attention.sum(1)]).astype(np.float64) ** 3
    expected = everything / everything.sum(1, keepdims=True)
    np.testing.assert_allclose(sharp, expected[:, :-1], rtol=1e-4)
    assert {path for path in weights if changed[path] is not weights[path]} == {
        "vision.last.q_proj.kernel",
        "vision.last.q_proj.bias",
    }


@pytest.mark.parametrize(("cells", "count"), [(1, 4), (2, 1), (3, 1)])
def test_a_window_shows_and_says_what_is_at_its_place(tokenizer, records, cells, count) -> None:
    group = max((records[start : start + 8] for start in range(0, 64, 8)), key=_places)
    windows = captions.WindowsOfGroup(tokenizer, VISION, cells, count)(group)
    side = cells * digits.CELL
    assert len({window.patches[0] for window in windows}) == min(count, _places(group))
    for index, (window, record) in enumerate(zip(windows, group * count, strict=True)):
        np.testing.assert_array_equal(window.patches, windows[index // 8 * 8].patches)
        row, column = np.array(divmod(window.patches[0], VISION.grid)) * VISION.patch_size
        image = np.asarray(images.load_image(record["image"]))
        shown = image[row : row + side, column : column + side]
        np.testing.assert_array_equal(window.pixels, shown)
        visible = []
        for place, digit in zip(record["places"], record["digits"], strict=True):
            cell = np.array(divmod(digits.PLACES.index(place.decode()), 3)) * digits.CELL
            if (cell >= (row, column)).all() and (cell < (row + side, column + side)).all():
                visible.append(f"{place.decode()} {digit}")
        assert tokenizer.decode(window.ids) == ", ".join(visible) + "."
        assert visible


def _places(group: list[dict]) -> int:
    return len(group[0]["places"])


def test_captions_are_padded_to_the_longest_of_their_window_size(config, tokenizer) -> None:
    packer = captions.CaptionPacker(tokenizer, max_length=20, mesh=make_mesh(1, 1, 1))
    data = open_windows(config, tokenizer).prepare()
    # BOS, place, digit, full stop, EOS; a further digit comes with its comma and its place.
    shapes = [
        prepared.batches[0].ids.shape for prepared in packer(data.batches(0, range(16), 1), 0)
    ]
    assert shapes == [(16, 5)] * 3 + [(16, 14)] * 2 + [(16, 20)] * 5
    short = captions.CaptionPacker(tokenizer, max_length=19, mesh=packer._mesh)
    with pytest.raises(ValueError, match="max_positions, now 19, to at least"):
        list(short(data.batches(0, range(16), 1), 0))


def test_a_window_uses_the_position_embeddings_of_its_place_alone(weights) -> None:
    rng = np.random.default_rng(3)
    rows, columns = np.meshgrid(np.arange(4, 8), np.arange(8, 12), indexing="ij")
    patches = np.tile((rows * VISION.grid + columns).ravel().astype(np.int32), (4, 1))
    ids = rng.integers(3, 300, (4, 24)).astype(np.int32)
    pixels = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = CaptionBatch(pixels, patches, ids, np.full(4, 24, np.int32))

    def loss(positions: jax.Array) -> jax.Array:
        changed = {**weights, "vision.position_embedding": positions}
        return contrastive_loss(changed, batch, vision=VISION, config=CONFIG)[0]

    gradient = jax.jit(jax.grad(loss))(weights["vision.position_embedding"])
    used = np.flatnonzero(np.abs(gradient).max(-1) > 0)
    np.testing.assert_array_equal(used, [0, *(1 + patches[0])])


def test_curriculum_resumes_anywhere_in_the_same_order(config, tokenizer) -> None:
    data = open_windows(config, tokenizer).prepare()
    straight = list(data.batches(0, range(16), 1))
    sides = [batch[0].pixels.shape[0] for batch in straight]
    assert sides == [32] * 3 + [64] * 2 + [96] * 5
    for done in (2, 3, 7):
        for got, expected in zip(
            data.batches(done * 16, range(16), 1), straight[done:], strict=True
        ):
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a.pixels, b.pixels)
                np.testing.assert_array_equal(a.ids, b.ids)


def test_curricula_that_do_not_fit_are_refused(config, tokenizer) -> None:
    changed = config.copy_and_resolve_references()
    changed.objective_options.curriculum = ((1, 0.5, 1), (3, 0.4, 1))
    with pytest.raises(ValueError, match="do not add up to 1"):
        open_windows(changed, tokenizer)
    changed.objective_options.curriculum = ((1, 1.0, 4),)
    with pytest.raises(ValueError, match="expected a multiple of 32"):
        open_windows(changed, tokenizer)
    changed.objective_options.group = 3
    with pytest.raises(ValueError, match="group is 3; expected a divisor"):
        open_windows(changed, tokenizer)

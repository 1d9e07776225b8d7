"""A tower without CLS token against transformers' SigLIP: features, substitutes, refusals."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from safetensors.numpy import load_file

from prumerge_jax.conversion import keys
from prumerge_jax.models.config import ATTENTION_SUBSTITUTES, VisionConfig
from prumerge_jax.models.llava import encode_images, normalize_pixels, patch_attention
from prumerge_jax.models.patch_attention import substitute_attention
from prumerge_jax.models.vision_tower import VisionTower
from tests.checkpoint_weights import filled

CONFIG = VisionConfig(
    image_size=48, patch_size=14, width=32, mlp_width=72, num_layers=3, num_heads=2,
    layer_norm_eps=1e-6, activation="gelu_tanh", pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3,
    cls_token=False, pre_norm=False, patch_bias=True, feature_layer=-1, attention="received",
)  # fmt: skip
WITH_HEAD = dataclasses.replace(CONFIG, pooling_head=True, attention="map")


def tower(config: VisionConfig, tensors: dict[str, np.ndarray]) -> VisionTower:
    """A tower with these weights, under canonical keys."""
    with nnx.use_eager_sharding(False):
        model = VisionTower(config, rngs=nnx.Rngs(0))
    model = filled(model, keys.vision_weights(config), tensors, "vision.")
    if config.pooling_head:
        head, root = model.head, "vision_tower.head"
        query, key, _ = np.split(tensors[f"{root}.attention.in_proj_weight"], 3)
        query_bias, key_bias, _ = np.split(tensors[f"{root}.attention.in_proj_bias"], 3)
        head.q_proj.kernel[...], head.q_proj.bias[...] = query.T, query_bias
        head.k_proj.kernel[...], head.k_proj.bias[...] = key.T, key_bias
        head.probe[...] = tensors[f"{root}.probe"][0, 0]
        head.layer_norm.scale[...] = tensors["vision_tower.post_layernorm.weight"]
        head.layer_norm.bias[...] = tensors["vision_tower.post_layernorm.bias"]
    return model


def canonical(file: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        keys.canonical_key(key, keys.Dialect.HF): value.astype(np.float32)
        for key, value in load_file(file).items()
    }


def test_features_and_the_pooling_heads_attention(golden: pathlib.Path) -> None:
    folder = golden / "models/siglip_head"
    own = load_file(folder / "model.safetensors")
    tensors = {f"vision_tower.{k.removeprefix('vision_model.')}": v for k, v in own.items()}
    model = tower(WITH_HEAD, {key: value.astype(np.float32) for key, value in tensors.items()})
    expected = np.load(folder / "golden.npz")
    pixels = jnp.asarray(expected["pixels"].transpose(0, 2, 3, 1))
    features = jax.jit(lambda model, pixels: model(pixels))(model, pixels)
    np.testing.assert_allclose(features.hidden, expected["hidden_last"], atol=2e-4, rtol=2e-4)
    attention = jax.jit(patch_attention)(model, features)
    np.testing.assert_allclose(attention, expected["proxy_map"], atol=1e-5)


def squeezed(picture: PIL.Image.Image) -> np.ndarray:
    """Normalised pixels [S, S, 3] of a picture resized without regard to its aspect."""
    side = CONFIG.image_size
    pixels = np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC))
    return np.asarray(normalize_pixels(jnp.asarray(pixels), CONFIG))


def frames(picture: PIL.Image.Image, count: int) -> np.ndarray:
    """The golden videos: a window of 60 % that moves from corner to corner."""
    (w, h), (cw, ch) = picture.size, (picture.width * 6 // 10, picture.height * 6 // 10)
    corners = [((w - cw) * t // (count - 1), (h - ch) * t // (count - 1)) for t in range(count)]
    return np.stack([squeezed(picture.crop((x, y, x + cw, y + ch))) for x, y in corners])


def test_features_and_substitutes_for_cls_attention(golden: pathlib.Path) -> None:
    folder = golden / "models/onevision_tied"
    tensors = canonical(folder / "model.safetensors")
    expected = np.load(folder / "golden.npz")
    with PIL.Image.open(golden / "images/waterview.jpg") as photo:
        video = frames(photo.convert("RGB"), 5)
    with PIL.Image.open(golden / "models/images/wide_97x61.png") as picture:
        base = squeezed(picture.convert("RGB"))[None]
    features = jax.jit(lambda pixels: tower(CONFIG, tensors)(pixels))(np.concatenate([video, base]))
    cases = {"video/five": slice(0, 5), "image/wide_97x61": slice(5, 6)}
    for case, part in cases.items():
        hidden = expected[f"{case}/features_before_projector"][: part.stop - part.start]
        np.testing.assert_allclose(features.hidden[part], hidden, atol=2e-4, rtol=2e-4)
    for name in ATTENTION_SUBSTITUTES[:-1]:
        got = substitute_attention(name, features.queries, features.keys, CONFIG.num_heads)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)
        for case, part in cases.items():
            proxy = expected[f"{case}/proxy_{name}"][: part.stop - part.start]
            np.testing.assert_allclose(got[part], proxy, atol=1e-5)


@pytest.mark.slow
def test_reductions_read_the_substitute() -> None:
    """Images of a batch do not see each other, and a broken one stays alone."""
    with nnx.use_eager_sharding(False):
        model = VisionTower(CONFIG, rngs=nnx.Rngs(1))
    side = CONFIG.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    encode = jax.jit(encode_images, static_argnames="reduction")
    together = encode(model, jnp.asarray(pixels), reduction="prumerge")
    alone = encode(model, jnp.asarray(pixels[1:2]), reduction="prumerge")
    assert together.lengths[1] == alone.lengths[0] > 0
    np.testing.assert_allclose(together.tokens[1], alone.tokens[0], atol=1e-5)
    with pytest.raises(ValueError, match="reads 'cls', which a tower without CLS token"):
        encode_images(model, jnp.asarray(pixels), "visionzip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "cls"}, "without CLS token and without pooling head supports received, "),
        ({"attention": "map"}, "'map'; a tower without CLS token and without pooling head"),
        ({"cls_token": True}, "'received'; a tower with CLS token supports cls"),
        ({"cls_token": True, "attention": "map"}, "'map'; a tower with CLS token supports cls"),
        ({"pooling_head": True, "feature_layer": -2}, "pooling_head is for a tower without CLS"),
        ({"feature_layer": -3}, "feature_layer is -3; expected -2 or -1"),
        ({"image_size": 13}, "image_size 13 is below patch_size 14"),
    ],
)
def test_attention_that_is_not_there_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)

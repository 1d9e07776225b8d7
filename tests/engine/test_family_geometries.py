"""Other geometries than the golden ones, and other image shapes, against transformers."""

import dataclasses
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies
from PIL import Image

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

from prumerge_jax import reductions  # noqa: E402
from prumerge_jax.conversion import keys  # noqa: E402
from prumerge_jax.data.images import OneOfSeveral, Video, normalize  # noqa: E402
from prumerge_jax.data.pictures import Picture, PictureProcessor, default_mode  # noqa: E402
from prumerge_jax.data.tokens import IMAGE_TOKEN  # noqa: E402
from prumerge_jax.engine.encoding import PlacedModel  # noqa: E402
from prumerge_jax.engine.engine import Engine  # noqa: E402
from prumerge_jax.engine.request import ImageInput, Request  # noqa: E402
from prumerge_jax.engine.shapes import EngineShapes  # noqa: E402
from prumerge_jax.families import find  # noqa: E402
from prumerge_jax.families.fields import Section  # noqa: E402
from prumerge_jax.models.config import LlavaConfig  # noqa: E402
from prumerge_jax.models.llava import LlavaModel  # noqa: E402
from tests.checkpoint_weights import filled  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

IMAGE_ID, VIDEO_ID, VOCABULARY = 120, 121, 128
CLASSES = {
    "llava_next": transformers.LlavaNextConfig,
    "llava_onevision": transformers.LlavaOnevisionConfig,
    "video_llava": transformers.VideoLlavaConfig,
}


def config_of(family: str, rng: np.random.Generator) -> Any:
    """A random small geometry: grid, depth, number of heads and of key heads."""
    patch, grid = int(rng.choice([4, 6])), int(rng.choice([3, 5]))
    is_siglip = family == "llava_onevision"
    side = patch * grid + (2 if is_siglip else 0)
    vision = {
        "model_type": "siglip_vision_model" if is_siglip else "clip_vision_model",
        "image_size": side, "patch_size": patch, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": int(rng.choice([2, 3])),
    } | ({"vision_use_head": False} if is_siglip else {})  # fmt: skip
    heads = int(rng.choice([4, 6]))
    text = {
        "model_type": {"llava_next": "mistral", "llava_onevision": "qwen2"}.get(family, "llama"),
        "vocab_size": VOCABULARY, "hidden_size": 8 * heads, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "head_dim": 8, "max_position_embeddings": 2048, "sliding_window": None,
    }  # fmt: skip
    own: dict[str, Any] = {}
    if family != "video_llava":
        tiles = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]
        own["image_grid_pinpoints"] = [[side * a, side * b] for a, b in tiles]
    if family != "llava_next":
        own["video_token_index"] = own["video_token_id"] = VIDEO_ID
    if is_siglip:
        own["vision_aspect_ratio"] = "anyres_max_2"
    index = {"image_token_index": IMAGE_ID, "image_token_id": IMAGE_ID}
    return CLASSES[family](vision_config=vision, text_config=text, **index, **own)


def ours(oracle: torch.nn.Module, given: Any) -> tuple[LlavaConfig, LlavaModel]:
    fields = given.to_dict() | {"architectures": [type(oracle).__name__]}
    family = find(fields)
    assert family is not None
    config = family.parse(Section(fields, "config.json"))
    tensors = {
        keys.canonical_key(key, keys.Dialect.HF): value.float().numpy()
        for key, value in oracle.state_dict().items()
    }
    with nnx.use_eager_sharding(False):
        model = LlavaModel(config, rngs=nnx.Rngs(0))
    return config, filled(model, keys.weights(config), tensors)


def pictures(
    config: LlavaConfig, rng: np.random.Generator
) -> list[tuple[Picture, tuple[int, int]]]:
    """Three images of any shape, or an image and a video of 1 to 9 frames."""
    show = PictureProcessor(config, config.vision.image_size, default_mode(config))

    def image(height: int, width: int) -> np.ndarray:
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)

    sizes = [tuple(map(int, rng.integers(5, 90, 2))) for _ in range(3)]
    if config.family == "llava_next" or rng.random() < 0.3:
        return [(show(OneOfSeveral(image(*size))), size) for size in sizes]
    frames = [image(*sizes[1]) for _ in range(int(rng.integers(1, 10)))]
    return [(show(image(*sizes[0])), sizes[0]), (show(Video(frames)), sizes[1])]


def inputs(
    config: LlavaConfig, shown: list[tuple[Picture, tuple[int, int]]], token_ids: np.ndarray
) -> dict[str, torch.Tensor]:
    """The arguments of transformers' forward pass."""
    is_image, vision = token_ids == IMAGE_TOKEN, config.vision
    widths, ids = np.ones(len(token_ids), int), token_ids.copy()
    widths[is_image] = [picture.layout.span for picture, _ in shown]
    ids[is_image] = [VIDEO_ID if p.layout.frames else IMAGE_ID for p, _ in shown]
    found = {"input_ids": torch.tensor(np.repeat(ids, widths)).long()[None]}
    pixels, sizes = [], []
    for picture, size in shown:
        crops = normalize(picture.crops, vision.pixel_mean, vision.pixel_std)
        crops = crops.transpose(0, 3, 1, 2)
        if picture.layout.frames:
            found["pixel_values_videos"] = torch.tensor(crops)[None]
        else:
            pixels.append(crops)
            sizes.append(size)
    if config.family == "video_llava":
        return found | {"pixel_values_images": torch.tensor(np.concatenate(pixels))}
    most = max(map(len, pixels))
    padded = [np.pad(p, ((0, most - len(p)), *[(0, 0)] * 3)) for p in pixels]
    found |= {"pixel_values": torch.tensor(np.stack(padded)), "image_sizes": torch.tensor(sizes)}
    if config.family == "llava_onevision":
        found["batch_num_images"] = torch.tensor([len(pixels)])
    return found


@pytest.mark.parametrize("family", CLASSES)
def test_logits_of_random_geometries(family: str) -> None:
    rng = np.random.default_rng(sum(map(ord, family)))
    torch.manual_seed(3)
    given = config_of(family, rng)
    oracle = transformers.AutoModelForImageTextToText.from_config(given).eval()
    with torch.no_grad():
        for weight in oracle.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.1)
    config, model = ours(oracle, given)
    graphdef, state = nnx.split(model)
    shapes = EngineShapes(
        batch_size=16, window_size=64, row_length=512, longest_prompt=512, prefill_rows=1, slots=2,
        cache_length=512,
    )  # fmt: skip
    placed = PlacedModel(graphdef, state, config, jnp.dtype(jnp.float32))
    engine = Engine(placed, reductions.parse("full"), shapes)
    for key in range(2):
        shown = pictures(config, rng)
        text = rng.integers(3, 100, 9).astype(np.int32)
        token_ids = np.insert(text, np.sort(rng.integers(1, 9, len(shown))), IMAGE_TOKEN)
        request = Request(key, token_ids, tuple(ImageInput(*picture) for picture, _ in shown))
        (result,) = engine.logits([request])
        with torch.no_grad():
            expected = oracle(**inputs(config, shown, token_ids)).logits[0].numpy()
        np.testing.assert_allclose(result.values, expected, atol=3e-4, rtol=3e-4)


SIDE = 28
PINPOINTS = [[SIDE * a, SIDE * b] for a in (1, 2, 3) for b in (1, 2, 3) if a * b > 1]


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    strategies.one_of(
        strategies.tuples(strategies.integers(1, 400), strategies.integers(1, 400)),
        strategies.sampled_from([(1, 1600), (1600, 1), (3000, 4000), (9, 1500), (2999, 1501)]),
    )
)
def test_tiles_of_any_shape(size: tuple[int, int]) -> None:
    height, width = size
    hypothesis.assume(max(size) <= 2000 * min(size))
    column = (np.arange(width) * 7 % 256).astype(np.uint8)
    row = (np.arange(height) * 5 % 256).astype(np.uint8)
    pixels = np.stack([np.add.outer(row, column), np.add.outer(row, column // 2)] * 2, -1)[..., :3]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    config = dataclasses.replace(
        LlavaConfig(), family="llava_next", image_newline=True,
        image_grid_pinpoints=tuple(map(tuple, PINPOINTS)),
        vision=dataclasses.replace(LlavaConfig().vision, image_size=SIDE),
    )  # fmt: skip
    picture = PictureProcessor(config, SIDE, "anyres")(image)
    theirs = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )(image, return_tensors="np")
    expected = theirs["pixel_values"][0]
    vision = config.vision
    ours = normalize(picture.crops, vision.pixel_mean, vision.pixel_std).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(ours, expected)

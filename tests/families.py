"""The golden models of further families: their sizes, weights, images and requests."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file

from prumerge_jax import reductions, sharding
from prumerge_jax.conversion import keys
from prumerge_jax.data.pictures import PictureProcessor, default_mode
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.models.llava import LlavaModel, abstract_model
from tests.checkpoint_weights import filled

TILE = 56
NEXT_VICUNA = LlavaConfig(
    vision=VisionConfig(image_size=TILE, width=32, mlp_width=64, num_layers=3, num_heads=2),
    text=TextConfig(
        vocab_size=256, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=4,
        head_dim=12, max_positions=1024,
    ),
    image_token_id=250,
    pad_token_id=None,
    eos_token_ids=(2,),
    family="llava_next",
    image_newline=True,
    image_grid_pinpoints=((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)),
)  # fmt: skip
NEXT_MISTRAL = dataclasses.replace(
    NEXT_VICUNA,
    text=dataclasses.replace(NEXT_VICUNA.text, num_kv_heads=2, rope_theta=1e6),
)
ONEVISION_TIED = LlavaConfig(
    vision=VisionConfig(
        image_size=48, patch_size=14, width=32, mlp_width=72, num_layers=3, num_heads=2,
        layer_norm_eps=1e-6, activation="gelu_tanh", pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3,
        cls_token=False, pre_norm=False, patch_bias=True, feature_layer=-1, attention="received",
    ),
    text=TextConfig(
        vocab_size=256, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, rope_theta=1e6, rms_norm_eps=1e-6, max_positions=2048, qkv_bias=True,
        tied_head=True,
    ),
    image_token_id=250,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_ids=(2,),
    family="llava_onevision",
    video_token_id=251,
    image_newline=True,
    image_grid_pinpoints=tuple((48 * a, 48 * b) for a in range(1, 7) for b in range(1, 7)),
    anyres_max=9,
)  # fmt: skip
VIDEO_LLAVA = LlavaConfig(
    vision=dataclasses.replace(NEXT_VICUNA.vision, activation="gelu"),
    text=NEXT_VICUNA.text,
    image_token_id=250,
    pad_token_id=None,
    eos_token_ids=(2,),
    family="video_llava",
    video_token_id=251,
    video_tower=True,
)
CONFIGS = {
    "next_vicuna": NEXT_VICUNA,
    "next_mistral": NEXT_MISTRAL,
    "onevision_tied": ONEVISION_TIED,
    "video_llava": VIDEO_LLAVA,
}


class GoldenModel:
    """A golden folder of a family.

    Attributes:
      config: its sizes.
      model: its weights.
      cases: what `golden.json` says of every case, by name.
      arrays: `golden.npz`.
    """

    def __init__(self, golden: pathlib.Path, name: str) -> None:
        self.golden, self.config = golden, CONFIGS[name]
        folder = golden / "models" / name
        cases = json.loads((folder / "golden.json").read_text())
        self.cases: dict[str, dict[str, Any]] = {case["case"]: case for case in cases}
        self.arrays = np.load(folder / "golden.npz")
        self.model = load_model(self.config, folder / "model.safetensors")
        size = self.config.vision.image_size
        self.processor = PictureProcessor(self.config, size, default_mode(self.config))

    def image(self, name: str) -> pathlib.Path:
        """The file of an image."""
        drawn = self.golden / "models" / "images" / f"{name}.png"
        return drawn if drawn.is_file() else self.golden / "images" / f"{name}.jpg"

    def token_ids(self, case: str) -> np.ndarray:
        """The prompt of a case with one placeholder for each image."""
        ids = self.arrays[f"{case}/input_ids"]
        is_image = ids == self.config.image_token_id
        first = is_image & ~np.append(False, is_image[:-1])
        return np.where(is_image, IMAGE_TOKEN, ids)[~is_image | first].astype(np.int32)

    def request(self, key: int, case: str, **sampling: Any) -> Request:
        """The request of a case whose image has its name."""
        picture = self.processor(self.image(case.rsplit("/", 1)[-1]))
        images = (ImageInput(*picture, key=case),)
        params = SamplingParams(max_new_tokens=8, **sampling)
        return Request(key, self.token_ids(case), images, sampling=params)


@functools.cache
def golden_model(golden: pathlib.Path, name: str) -> GoldenModel:
    """A golden folder, read once."""
    return GoldenModel(golden, name)


def load_model(config: LlavaConfig, file: pathlib.Path) -> LlavaModel:
    """A model with the weights of a checkpoint of Hugging Face."""
    tensors = {
        keys.canonical_key(key, keys.Dialect.HF): value.astype(np.float32)
        for key, value in load_file(file).items()
    }
    with nnx.use_eager_sharding(False):
        model = LlavaModel(config, rngs=nnx.Rngs(0))
    return filled(model, keys.weights(config), tensors)


WIDE = EngineShapes(
    batch_size=8,
    window_size=32,
    row_length=256,
    longest_prompt=256,
    prefill_rows=2,
    slots=4,
    cache_length=256,
    decode_steps_per_call=4,
)


def engine_of(
    model: GoldenModel, reduction: str, *, base: EngineShapes = WIDE, **fields: Any
) -> Engine:
    """An engine of a golden model; `fields` are shapes other than those of `base`, and options."""
    graphdef, state = nnx.split(model.model)
    placed = PlacedModel(graphdef, state, model.config, jnp.dtype(jnp.float32))
    names = {field.name for field in dataclasses.fields(base)}
    shapes = {name: fields.pop(name) for name in names & set(fields)}
    return Engine(
        placed, reductions.parse(reduction), dataclasses.replace(base, **shapes), **fields
    )


def engine_on(mesh: Mesh, engine: Engine, **shapes: int) -> Engine:
    """The engine with its weights on a mesh, and other shapes."""
    model = engine.model
    shardings = sharding.weight_shardings(abstract_model(model.config)[1], mesh)
    state = jax.device_put(model.state, shardings)
    placed = PlacedModel(model.graphdef, state, model.config, model.dtype, mesh=mesh)
    return Engine(placed, engine.reduction, dataclasses.replace(engine.shapes, **shapes))

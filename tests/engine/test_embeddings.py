"""Projected visual tokens: their number, and the values that the projector makes of them."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from prumerge_jax.llava import Llava
from prumerge_jax.models.llava import LlavaModel, encode_images
from prumerge_jax.reductions import parse

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "vllm" / "embed_images.py"


@pytest.fixture(scope="module")
def llava() -> Llava:
    return Llava.load("miniature")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (96, 96, 3)).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["full", "prumerge"])
def test_one_row_per_visual_token(llava: Llava, reduction: str) -> None:
    images = [picture(seed) for seed in range(3)]
    model = nnx.merge(llava._model.graphdef, llava._model.state)
    chosen = parse(reduction).uncapped()

    @jax.jit
    def encode(model: LlavaModel, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        visual = encode_images(model.vision, pixels, chosen, dtype=llava.dtype)
        return model.projector(visual.tokens), visual.lengths

    for image, tokens in zip(images, llava.embed(images, reduction=reduction), strict=True):
        expected, (length,) = encode(model, np.array(image)[None])
        assert tokens.shape == (length, llava.config.text.width)
        np.testing.assert_allclose(tokens, expected[0, :length], rtol=1e-4, atol=1e-4)


def test_a_reduction_that_reads_the_question_is_refused(llava: Llava) -> None:
    with pytest.raises(ValueError, match="reads the question"):
        list(llava.embed([picture(0)], reduction="mmtok"))


@pytest.mark.torch
def test_the_file_for_vllm(llava: Llava, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    picture(0).save(tmp_path / "a.png")
    spec = importlib.util.spec_from_file_location("embed_images", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = tmp_path / "embedded"
    flags = ["--checkpoint", "miniature", "--reduction", "prumerge", "--output", str(output)]
    module.main([*flags, str(tmp_path / "a.png")])
    written = torch.load(output / "a.pt", weights_only=True)
    (tokens,) = llava.embed([picture(0)], reduction="prumerge")
    assert written.dtype == torch.bfloat16
    np.testing.assert_allclose(written.float().numpy(), tokens, rtol=0.01)

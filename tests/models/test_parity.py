"""Every module against transformers in PyTorch, float32, random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")

from prumerge_jax import prumerge  # noqa: E402
from prumerge_jax.models.config import TextConfig, VisionConfig, published  # noqa: E402
from prumerge_jax.models.llava import LlavaModel  # noqa: E402
from tests.models.torch_llava import our_model, random_torch_llava  # noqa: E402
from tests.tiny_llava import random_llava  # noqa: E402

pytestmark = pytest.mark.torch

TINY = dataclasses.replace(
    published("tiny"), text=dataclasses.replace(published("tiny").text, vocab_size=32010)
)
GEOMETRIES = {
    "grouped_queries": TINY,
    "one_kv_head_wide_heads": dataclasses.replace(
        TINY,
        vision=VisionConfig(
            image_size=28, patch_size=7, width=24, mlp_width=40, num_layers=2, num_heads=4
        ),
        text=TextConfig(
            vocab_size=32010, width=40, mlp_width=72, num_layers=3, num_heads=4, num_kv_heads=1,
            head_dim=16, max_positions=512,
        ),
    ),
    "all_heads_gelu": dataclasses.replace(
        TINY,
        vision=dataclasses.replace(TINY.vision, num_layers=4, activation="gelu"),
        text=dataclasses.replace(TINY.text, num_kv_heads=4),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=GEOMETRIES, ids=list(GEOMETRIES))
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, LlavaModel]:
    config = GEOMETRIES[request.param]
    oracle = random_torch_llava(config)
    return oracle, our_model(oracle, config)


features_of = jax.jit(lambda tower, pixels: tower(pixels))


def image_batch(model: LlavaModel, batch: int) -> np.ndarray:
    side = model.vision.config.image_size
    return np.random.default_rng(1).normal(size=(batch, side, side, 3)).astype(np.float32)


def test_vision_tower(pair: tuple[torch.nn.Module, LlavaModel]) -> None:
    oracle, ours = pair
    pixels = image_batch(ours, 2)
    tower = oracle.model.vision_tower
    seen = {}
    last = tower.encoder.layers[-1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(last, name).register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out.detach().numpy())
        )
    with torch.no_grad():
        hidden = tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    got = features_of(ours.vision, pixels)
    np.testing.assert_allclose(got.hidden, hidden.hidden_states[-2], atol=1e-5)
    np.testing.assert_allclose(got.keys, seen["k_proj"], atol=1e-5)
    np.testing.assert_allclose(got.queries[:, 0], seen["q_proj"][:, 0], atol=1e-5)


def test_image_and_text(pair: tuple[torch.nn.Module, LlavaModel]) -> None:
    """An unreduced image inside a text, through all three stages."""
    oracle, ours = pair
    config = ours.vision.config
    pixels = image_batch(ours, 2)
    before, after = [1, 319, 1404, 29901], [13, 5618, 338]
    placeholder = [32000] * config.num_patches
    ids = np.array([before + placeholder + after] * 2)
    with torch.no_grad():
        expected = oracle(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))
        ).logits.numpy()
    slots = np.full(ids.shape, -1)
    slots[:, len(before) : -len(after)] = np.arange(2 * config.num_patches).reshape(2, -1)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)

    @jax.jit
    def logits(ours: LlavaModel) -> jax.Array:
        hidden = ours.vision(jnp.asarray(pixels)).hidden[:, 1:]
        x = ours.embed_rows(jnp.asarray(ids), hidden, jnp.asarray(slots))
        out = ours.decoder(x, jnp.asarray(positions), jnp.ones(ids.shape, jnp.int32))
        return ours.decoder.logits(out)

    np.testing.assert_allclose(logits(ours), expected, atol=1e-4)


def test_cls_attention_matches_wide_head(pair: tuple[torch.nn.Module, LlavaModel]) -> None:
    """Attention from our features equals the softmax over one head as wide as the tower."""
    _, ours = pair
    features = features_of(ours.vision, image_batch(ours, 2))
    got = prumerge.cls_attention(features.queries[:, 0], features.keys)
    q, k = (torch.tensor(np.array(x)) for x in (features.queries[:, 0], features.keys))
    logits = torch.einsum("bd,bnd->bn", q, k) * q.shape[-1] ** -0.5
    np.testing.assert_allclose(got, torch.softmax(logits, -1)[:, 1:].numpy(), atol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.slow
def test_gradients_reach_every_weight() -> None:
    ours = random_llava(GEOMETRIES["one_kv_head_wide_heads"])
    graphdef, state = nnx.split(ours)
    ids = jnp.array([[5, 6, 0, 7]])

    def loss(state: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, state)
        features = model.vision(jnp.asarray(image_batch(ours, 1)))
        x = model.embed_rows(ids, features.hidden[:, 1:2], jnp.array([[-1, -1, 0, -1]]))
        hidden = model.decoder(x, jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32), remat="full")
        return (
            model.decoder.logits(hidden).std() + features.keys.std() + features.queries[:, 0].std()
        )

    gradient = jax.jit(jax.grad(loss))(state)
    for path, leaf in nnx.to_flat_state(gradient):
        assert float(jnp.abs(leaf[...]).max()) > 0, path

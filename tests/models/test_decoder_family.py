"""Text-only decoders of other families against transformers: biases, tied heads, scaled rotary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")
import transformers  # noqa: E402

from prumerge_jax.conversion import keys  # noqa: E402
from prumerge_jax.models.attention import KVPages, empty_pages  # noqa: E402
from prumerge_jax.models.config import RopeScaling, TextConfig  # noqa: E402
from prumerge_jax.models.llama import Llama  # noqa: E402
from tests.checkpoint_weights import filled  # noqa: E402

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
TEXT = TextConfig(
    vocab_size=96, width=48, mlp_width=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12,
    rms_norm_eps=1e-6, max_positions=512,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def variant(**fields: object) -> TextConfig:
    return dataclasses.replace(TEXT, **fields)


CASES = {
    "mistral_theta_1e6": (
        transformers.MistralConfig(
            **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            sliding_window=None, tie_word_embeddings=False,
        ),
        variant(rope_theta=1e6),
    ),
    "qwen2_tied": (
        transformers.Qwen2Config(
            **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        ),
        variant(rope_theta=1e6, qkv_bias=True, tied_head=True),
    ),
    "llama3_wide_heads": (
        transformers.LlamaConfig(
            **SIZES, rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=False
        ),
        variant(
            rope_theta=5e5, head_dim=16, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
        ),
    ),
    "llama_linear": (
        transformers.LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            tie_word_embeddings=False,
        ),
        variant(rope_scaling=RopeScaling("linear", 4.0)),
    ),
}  # fmt: skip


def pair(name: str) -> tuple[torch.nn.Module, Llama]:
    """transformers' model with random weights, and ours with the same."""
    hf_config, config = CASES[name]
    torch.manual_seed(0)
    oracle = transformers.AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    tensors = {
        keys.canonical_key(key, keys.Dialect.LLAVA): tensor.detach().numpy()
        for key, tensor in oracle.state_dict().items()
    }
    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return oracle, filled(abstract, keys.decoder_weights(config), tensors, "decoder.")


SLOW = ("mistral_theta_1e6", "llama_linear")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_logits_and_decoding(name: str) -> None:
    oracle, ours = pair(name)
    length, prompt = 40, 36
    ids = np.random.default_rng(0).integers(0, 96, (2, length))
    with torch.no_grad():
        expected = oracle(torch.tensor(ids)).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    x = ours.embed(jnp.asarray(ids), jnp.float32)
    segments = jnp.ones(ids.shape, jnp.int32)
    logits = jax.jit(lambda ours, *row: ours.logits(ours(*row)))(ours, x, positions, segments)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)

    tables = jnp.arange(6).reshape(2, 3)  # pages of 16 tokens
    places = 48 * jnp.arange(2)[:, None] + positions
    begin = slice(None), slice(prompt)
    pages = empty_pages(ours.config, 6, 16, jnp.float32)
    _, pages = jax.jit(Llama.prefill)(
        ours, x[begin], positions[begin], segments[begin], pages, places[begin]
    )

    @jax.jit
    def decode(ours: Llama, x: jax.Array, position: jax.Array, pages: KVPages, place: jax.Array):
        hidden, pages = ours.decode(x, position, pages, tables, place, position + 1)
        return ours.logits(hidden[:, 0]), pages

    for at in range(prompt, length):
        here = (x[:, at : at + 1], positions[:, at])
        logits, pages = decode(ours, *here, pages, places[:, at])
        np.testing.assert_allclose(logits, expected[:, at], atol=2e-4, rtol=2e-4)

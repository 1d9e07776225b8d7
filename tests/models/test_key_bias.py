"""A bias per key on every backend, against an explicit one in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.models.attention import attend, attend_to_pages, empty_pages, write_to_pages
from prumerge_jax.models.attention.key_bias import widened, with_columns
from prumerge_jax.models.llama import Llama
from tests.tiny_llava import CONFIG, random_llava

WIDTH = 61
"""Three columns more are what the kernel of TPUs takes."""


def random_case(width: int, length: int = 40, kv_heads: int = 2):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, length, heads, width)).astype(np.float32)
        for heads in (4, kv_heads, kv_heads)
    )
    bias = np.log(rng.integers(1, 30, (2, length))).astype(np.float32)
    segments = np.ones((2, length), np.int32)
    segments[0, 15:] = 2
    segments[1, 33:] = 0
    return q, k, v, bias, segments


def by_torch(q, k, v, bias, segments=None, *, causal: bool):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = torch.tensor(bias)[:, None, None].expand(-1, 1, q.shape[2], -1).clone()
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if segments is not None:
        ids = torch.tensor(segments)
        seen = seen & (ids[:, :, None] == ids[:, None])[:, None]
    mask = mask.masked_fill(~seen, float("-inf"))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["xla", "blocks", "splash"])
def test_every_backend_adds_it(backend: str, causal: bool) -> None:
    q, k, v, bias, segments = random_case(WIDTH)
    run = jax.jit(functools.partial(attend, causal=causal, implementation=backend))
    got = run(q, k, v, segment_ids=segments, key_bias=bias)
    expected = by_torch(q, k, v, bias, segments, causal=causal)
    assert got.shape == q.shape
    real = segments > 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-4)


@pytest.mark.torch
def test_pages_keep_it() -> None:
    q, k, v, bias, _ = random_case(12)
    _, wide_k, wide_v = with_columns(q, k, v, jnp.asarray(bias))
    wide_q, _, _ = with_columns(q[:, -1:], k[:, -1:], v[:, -1:], jnp.zeros((2, 1)))
    pages = empty_pages(CONFIG.text, 12, 8, jnp.float32, key_bias=True)
    places = jnp.arange(80).reshape(2, 40)
    pages = write_to_pages(pages, wide_k, wide_v, 1, 2, places)
    got = attend_to_pages(wide_q, pages, 1, 2, places[:, ::8] // 8, jnp.array([40, 40]))
    expected = by_torch(q[:, -1:], k, v, bias, causal=False)
    np.testing.assert_allclose(got[..., :12], expected, atol=1e-4)


def test_a_merged_token_attends_like_its_copies() -> None:
    q, k, v, _, _ = random_case(16, length=6)
    copies = np.array([3, 1, 4, 1, 2, 1])
    several = [np.repeat(x, copies, axis=1) for x in (k, v)]
    queries = np.repeat(q, copies, axis=1)
    expected = attend(queries, *several)
    bias = jnp.broadcast_to(jnp.log(jnp.asarray(copies, jnp.float32)), (2, 6))
    got = attend(q, k, v, key_bias=bias)
    np.testing.assert_allclose(np.repeat(got, copies, axis=1), expected, atol=1e-5)


def test_the_bias_is_exact_in_bfloat16() -> None:
    bias = jnp.asarray([[3.1415927, 0.0, 6.3561077]])
    ones = jnp.ones((1, 3, 1, 8), jnp.bfloat16)
    _, k, _ = with_columns(ones, ones, ones, bias)
    summed = k[0, :, 0, 8:].astype(jnp.float32).sum(-1) / np.sqrt(widened(8))
    np.testing.assert_allclose(summed, bias[0], rtol=1e-6)


def test_gradients_are_those_of_an_explicit_bias() -> None:
    q, k, v, bias, _ = (jnp.asarray(x) for x in random_case(8, length=10, kv_heads=4))

    def explicit(q, k, v):
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * 8**-0.5 + bias[:, None, None]
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, -1), v)

    expected = jax.jit(jax.grad(lambda *x: (explicit(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    for backend in ("xla", "blocks"):

        def ours(*x, backend=backend):
            return (attend(*x, key_bias=bias, implementation=backend) ** 2).sum()

        got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q, k, v)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_decoding_goes_on_from_a_prompt_with_a_bias() -> None:
    """One more token through the cache is one more token of the row."""
    decoder: Llama = random_llava(CONFIG).decoder
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 9, CONFIG.text.width)), jnp.float32)
    bias = jnp.asarray(np.append(np.log(rng.integers(1, 9, 8)), 0)[None], jnp.float32)
    at, ones = jnp.arange(9)[None], jnp.ones((1, 9), jnp.int32)
    forward = jax.jit(type(decoder).__call__)
    whole = forward(decoder, x, at, ones, key_bias=bias)
    unbiased = forward(decoder, x, at, ones, key_bias=jnp.zeros_like(bias))
    assert float(jnp.abs(whole - unbiased).max()) > 1e-3
    pages = empty_pages(CONFIG.text, 4, 4, jnp.float32, key_bias=True)
    places = jnp.arange(9)[None]
    _, pages = jax.jit(type(decoder).prefill)(
        decoder, x[:, :8], at[:, :8], ones[:, :8], pages, places[:, :8], key_bias=bias[:, :8]
    )
    tables = jnp.arange(4)[None]
    last, _ = jax.jit(type(decoder).decode)(
        decoder, x[:, 8:], jnp.array([8]), pages, tables, jnp.array([8]), jnp.array([9])
    )
    np.testing.assert_allclose(last, whole[:, 8:], atol=1e-4)

"""Attention to pages: every form against loops, whatever other pages hold."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from prumerge_jax import sharding
from prumerge_jax.models import tuning
from prumerge_jax.models.attention import KVPages, attend_to_pages, empty_pages, write_to_pages
from prumerge_jax.models.attention.pages import form_for
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.tuning import Tuning
from tests.conftest import require_eight_devices

LAYERS, LENGTHS = 2, (5, 33, 0, 130)
FORMS = ("xla", "paged_tpu", "paged_gpu")
TOLERANCE = {"xla": 2e-6, "paged_tpu": 1e-2, "paged_gpu": 5e-6}  # the TPU's computes in bfloat16


class Case(NamedTuple):
    """Sequences of `LENGTHS` with their pages; `k` and `v` are [B, T, K, Dh], of layer 1."""

    q: jax.Array
    k: np.ndarray
    v: np.ndarray
    tables: np.ndarray
    places: np.ndarray
    config: TextConfig
    page_size: int


def case(page_size: int, heads: int = 4, kv_heads: int = 2, shards: int = 1) -> Case:
    """Pages in random order, numbered from 0 on every shard; sequences are spread over shards."""
    rng = np.random.default_rng(0)
    batch, longest, head_dim = len(LENGTHS), max(LENGTHS), 64
    q = rng.normal(size=(batch, 1, heads, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, longest, kv_heads, head_dim)).astype(np.float32)
    width = -(-longest // (page_size * 8)) * 8
    tables, places = np.zeros((batch, width), np.int32), np.full((batch, longest), -1, np.int32)
    for shard in range(shards):
        free = rng.permutation(batch * width // shards).tolist()
        for row in range(shard * batch // shards, (shard + 1) * batch // shards):
            for nth in range(-(-LENGTHS[row] // page_size)):
                tables[row, nth] = free.pop()
            at = np.arange(LENGTHS[row])
            places[row, : LENGTHS[row]] = tables[row, at // page_size] * page_size + at % page_size
    config = TextConfig(
        num_layers=LAYERS, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    return Case(jnp.asarray(q), k, v, tables, places, config, page_size)


def run(given: Case, form: str, poison: float = 0.0) -> jax.Array:
    """The case's attention; what no token was written to holds `poison`."""
    pages = empty_pages(
        given.config, given.tables.size, given.page_size, jnp.dtype("float32"), implementation=form
    )
    pages = jax.tree.map(lambda x: x + poison, pages)
    rows = map(jnp.asarray, (given.k, given.v))
    pages = write_to_pages(pages, *rows, 1, LAYERS, jnp.asarray(given.places), implementation=form)
    tables, lengths = jnp.asarray(given.tables), jnp.asarray(LENGTHS, jnp.int32)
    return attend_to_pages(given.q, pages, 1, LAYERS, tables, lengths, implementation=form)


def by_loops(given: Case) -> np.ndarray:
    """Float64; zeros for the sequence without tokens."""
    q = np.asarray(given.q, np.float64)
    out = np.zeros(q.shape)
    group = q.shape[2] // given.k.shape[2]
    for row, _, head in np.ndindex(*q.shape[:3]):
        keys, values = (x[row, : LENGTHS[row], head // group] for x in (given.k, given.v))
        if len(keys):
            scores = keys @ q[row, 0, head] / keys.shape[-1] ** 0.5
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("form", FORMS)
def test_equals_loops(form: str, page_size: int) -> None:
    given = case(page_size)
    interpreted = pltpu.force_tpu_interpret_mode() if "tpu" in form else contextlib.nullcontext()
    with interpreted:
        got = jax.jit(functools.partial(run, given, form))()
    filled = np.array(LENGTHS) > 0
    np.testing.assert_allclose(got[filled], by_loops(given)[filled], atol=TOLERANCE[form])


def test_plain_form_sees_nothing_of_other_pages() -> None:
    """Not even NaN, of whatever lies behind a sequence's end and in pages of nobody."""
    given = case(16)
    compiled = jax.jit(functools.partial(run, given, "xla"))
    np.testing.assert_array_equal(compiled(float("nan")), compiled(0.0))


def test_what_is_not_finite_is_never_written() -> None:
    given = case(16)
    given.k[0], given.v[0] = np.nan, np.inf
    pages = empty_pages(given.config, given.tables.size, 16, jnp.dtype("float32"))
    rows = map(jnp.asarray, (given.k, given.v))
    pages = write_to_pages(pages, *rows, 0, LAYERS, jnp.asarray(given.places))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(pages))
    assert all((x != 0).any() for x in jax.tree.leaves(pages))


def of_int8(given: Case) -> jax.Array:
    """The case's attention to keys and values of 8 bits."""
    pages = empty_pages(given.config, given.tables.size, given.page_size, jnp.dtype("int8"))
    assert pages.k.dtype == jnp.int8
    places = jnp.asarray(given.places)
    pages = write_to_pages(pages, *map(jnp.asarray, (given.k, given.v)), 1, LAYERS, places)
    tables, lengths = jnp.asarray(given.tables), jnp.asarray(LENGTHS, jnp.int32)
    return attend_to_pages(given.q, pages, 1, LAYERS, tables, lengths)


def rounded(x: np.ndarray) -> np.ndarray:
    """To 8 bits and back, by a scale for every token and head."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("shards", [1, 2])
def test_int8_equals_loops_over_rounded_keys_and_values(shards: int) -> None:
    given = case(16, shards=shards)
    on = sharding.use_mesh(sharding.make_mesh(1, 2, 2)) if shards > 1 else contextlib.nullcontext()
    with on:
        got = jax.jit(functools.partial(of_int8, given))()
    filled = np.array(LENGTHS) > 0
    exact = by_loops(given)
    expected = by_loops(given._replace(k=rounded(given.k), v=rounded(given.v)))
    np.testing.assert_allclose(got[filled], expected[filled], atol=2e-6)
    assert 1e-4 < np.abs(got[filled] - exact[filled]).max() < 0.03


def test_int8_takes_no_bias_of_keys() -> None:
    with pytest.raises(ValueError, match="merge=mean"):
        empty_pages(case(16).config, 8, 16, jnp.dtype("int8"), key_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 3])  # 3 do not divide over 2 devices
@pytest.mark.parametrize("form", ["xla", "paged_gpu"])
def test_shards_of_a_mesh_attend_to_their_own_pages(form: str, heads: int) -> None:
    require_eight_devices()
    given = case(16, heads, heads, shards=2)
    with sharding.use_mesh(sharding.make_mesh(1, 2, 2)):
        got = jax.jit(functools.partial(run, given, form))()
    filled = np.array(LENGTHS) > 0
    np.testing.assert_allclose(got[filled], by_loops(given)[filled], atol=TOLERANCE[form])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_and_no_more(dtype: str) -> None:
    given = case(16)
    rounded = [jnp.asarray(x).astype(dtype).astype(jnp.float32) for x in given[:3]]
    expected = by_loops(
        given._replace(q=rounded[0], k=np.asarray(rounded[1]), v=np.asarray(rounded[2]))
    )
    tables, lengths = jnp.asarray(given.tables), jnp.asarray(LENGTHS, jnp.int32)

    @jax.jit
    def attend(q, k, v):
        pages = empty_pages(given.config, tables.size, 16, jnp.dtype(dtype), implementation="xla")
        pages = write_to_pages(pages, k, v, 1, LAYERS, jnp.asarray(given.places))
        return attend_to_pages(q, pages, 1, LAYERS, tables, lengths)

    got = attend(*(jnp.asarray(x).astype(dtype) for x in given[:3]))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=2e-2)


def test_the_gpus_kernel_lowers_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prumerge_jax.models.attention.paged_kernels.platform", lambda: "cuda")
    shape = jax.ShapeDtypeStruct
    pool = shape((8, 2 * 64, 16, 128), jnp.bfloat16)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, tables: jax.Array, lengths: jax.Array):
        return attend_to_pages(
            q, KVPages(k, v), 1, LAYERS, tables, lengths, implementation="paged_gpu"
        )

    arguments = (shape((4, 1, 8, 128), jnp.bfloat16), pool, pool)
    arguments += (shape((4, 48), jnp.int32), shape((4,), jnp.int32))
    lowered = jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text().lower()


def test_heads_get_a_kernel_where_it_takes_them() -> None:
    for preferred, dtype, head_dim, expected in (
        ("paged_tpu", "bfloat16", 128, "paged_tpu"),
        ("paged_tpu", "float32", 128, "xla"),
        ("paged_tpu", "bfloat16", 64, "xla"),
        ("paged_gpu", "bfloat16", 64, "paged_gpu"),
        ("paged_gpu", "float32", 128, "xla"),
        ("xla", "bfloat16", 128, "xla"),
    ):
        with tuning.use(Tuning(cache_attention=preferred)):
            assert form_for(jnp.dtype(dtype), head_dim) == expected
    given = case(16)
    with pytest.raises(ValueError, match="unknown attention to pages 'flash'"):
        run(given, "flash")

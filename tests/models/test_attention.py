"""One seam, four backends: equal where this machine can run them, lowered where it cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import sharding
from prumerge_jax.models import tuning
from prumerge_jax.models.attention import attend, backend_for, splash
from prumerge_jax.models.attention.blocks import QUERY_BLOCK
from prumerge_jax.models.tuning import Tuning
from prumerge_jax.sharding.mesh import Axes
from tests.conftest import require_eight_devices


def random_qkv(heads: int = 4, kv_heads: int = 2, length: int = 128, width: int = 16):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width), (2, length, kv_heads, width), (2, length, kv_heads, width)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def segments(length: int) -> jax.Array:
    """Two segments and padding in one row, one full row."""
    ids = np.ones((2, length), np.int32)
    ids[0, length // 3 :] = 2
    ids[0, -length // 8 :] = 0
    return jnp.asarray(ids)


def short_segments(length: int, longest: int) -> jax.Array:
    """Rows with padding at the end. In the second, the third block sees the first one's end."""
    ids = np.zeros((2, length), np.int32)
    ids[0, :longest], ids[0, longest : longest + 40] = 1, 2
    ids[1, : QUERY_BLOCK - 18], ids[1, QUERY_BLOCK - 18 : QUERY_BLOCK - 18 + longest] = 1, 2
    return jnp.asarray(ids)


def branched_row(length: int, longest: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and branches [T] of one row: prefixes with branches, none of them together longer
    than `longest`, sequences that share nothing, and padding."""
    rng = np.random.default_rng(seed)
    segment_ids, branch_ids = np.zeros((2, length), np.int32)
    at, segment = 0, 0
    while at < length - longest:
        segment += 1
        sizes = [rng.integers(1, longest)]
        sizes += [rng.integers(1, longest - sizes[0] + 1) for _ in range(rng.integers(0, 6))]
        for branch, size in enumerate(sizes):
            segment_ids[at : at + size], branch_ids[at : at + size] = segment, branch
            at += size
    padding = slice(length - length // 9, None)
    segment_ids[padding] = branch_ids[padding] = 0
    return segment_ids, branch_ids


def branched_rows(length: int, longest: int) -> tuple[jax.Array, jax.Array]:
    """Two of them, [2, T] each."""
    rows = [branched_row(length, longest, seed) for seed in (3, 4)]
    segment_ids, branch_ids = (jnp.asarray(np.stack(ids)) for ids in zip(*rows, strict=True))
    return segment_ids, branch_ids


def naive(q, k, v, segment_ids, causal: bool, branch_ids=None) -> np.ndarray:
    """Loops over rows, heads and queries, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segment_ids, branch_ids = (x if x is None else np.asarray(x) for x in (segment_ids, branch_ids))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t in np.ndindex(*q.shape[:2]):
        seen = np.ones(q.shape[1], bool)
        if segment_ids is not None:
            seen = segment_ids[b] == segment_ids[b, t]
        if branch_ids is not None:
            seen = seen & np.isin(branch_ids[b], [0, branch_ids[b, t]])
        if causal:
            seen = seen & (np.arange(q.shape[1]) <= t)
        for h in range(q.shape[2]):
            logits = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize(
    ("implementation", "length"), [("xla", 24), ("blocks", 24), ("blocks", 150)]
)
def test_equals_loops(implementation: str, length: int, causal: bool, segmented: bool) -> None:
    q, k, v = random_qkv(length=length)
    ids = segments(length) if segmented else None
    run = jax.jit(functools.partial(attend, causal=causal, implementation=implementation))
    got = run(q, k, v, segment_ids=ids)
    np.testing.assert_allclose(got, naive(q, k, v, ids, causal), atol=2e-6)


@pytest.mark.parametrize("longest", [60, pytest.param(190, marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["xla", "blocks", "splash"])
def test_branches_see_their_prefix_and_themselves(
    monkeypatch: pytest.MonkeyPatch, implementation: str, longest: int
) -> None:
    """Against loops; sequences of up to `longest` tokens, wherever their prefix is."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    segment_ids, branch_ids = branched_rows(450, longest)
    assert branch_ids.max() > 2
    q, k, v = random_qkv(length=450)
    run = jax.jit(
        functools.partial(
            attend, causal=True, max_segment_length=longest, implementation=implementation
        )
    )
    got = run(q, k, v, segment_ids=segment_ids, branch_ids=branch_ids)
    np.testing.assert_allclose(got, naive(q, k, v, segment_ids, True, branch_ids), atol=2e-6)


def test_the_kernel_for_branches_lowers_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TPU here: the function lowered for one must contain the kernel twice."""
    monkeypatch.setattr(splash, "platform", lambda: "tpu")
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(length=256, width=128))
    segment_ids, branch_ids = branched_rows(256, 60)
    ids = {"segment_ids": segment_ids, "branch_ids": branch_ids}
    run = jax.jit(
        lambda q, k, v: attend(
            q, k, v, **ids, causal=True, max_segment_length=60, implementation="splash"
        )
    )
    text = run.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_tiles_between_a_branch_and_its_prefix_are_not_read() -> None:
    length = 4 * QUERY_BLOCK
    branch_ids = np.repeat(np.arange(8), QUERY_BLOCK // 2)[None].repeat(2, axis=0)
    segment_ids = np.ones_like(branch_ids)
    q, k, v = random_qkv(length=length)
    expected = naive(q, k, v, segment_ids, True, branch_ids)
    # Read and masked, it would be zero times NaN.
    v = v.at[:, QUERY_BLOCK : 3 * QUERY_BLOCK].set(jnp.nan)
    ids = {"segment_ids": jnp.asarray(segment_ids), "branch_ids": jnp.asarray(branch_ids)}
    run = jax.jit(functools.partial(attend, causal=True, implementation="blocks"))
    got = run(q, k, v, **ids)
    np.testing.assert_allclose(got[:, 3 * QUERY_BLOCK :], expected[:, 3 * QUERY_BLOCK :], atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_half_precision_rounds_and_no_more(implementation: str, dtype) -> None:
    q, k, v = (x.astype(dtype) for x in random_qkv(length=24))
    got = jax.jit(functools.partial(attend, causal=True, implementation=implementation))(q, k, v)
    expected = naive(q, k, v, None, causal=True)
    assert got.dtype == dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("implementation", "length", "width", "longest", "causal"),
    [
        ("splash", 300, 16, None, True),  # padded at the end, to three blocks
        ("splash", 128, 72, None, False),
        ("splash", 384, 128, 150, False),
        ("blocks", 3 * QUERY_BLOCK + 40, 16, 150, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("splash", 300, 16, 150, False),
                ("splash", 384, 128, None, False),
                ("splash", 384, 128, 150, True),
                ("blocks", 384, 16, None, False),
                ("blocks", 3 * QUERY_BLOCK + 40, 16, None, True),
                ("blocks", 3 * QUERY_BLOCK + 40, 16, 150, False),
            )
        ),
    ],
)
def test_equals_xla_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    length: int,
    width: int,
    longest: int | None,
    causal: bool,
) -> None:
    """Grouped heads and segments included; the TPU kernel in interpret mode."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    q, k, v = random_qkv(length=length, width=width)
    ids = segments(length) if longest is None else short_segments(length, longest)
    probe = jnp.cos(jnp.arange(q.size)).reshape(q.shape) * (ids > 0)[..., None, None]

    def loss(implementation: str, q, k, v) -> jax.Array:
        out = attend(
            q,
            k,
            v,
            segment_ids=ids,
            causal=causal,
            max_segment_length=longest,
            implementation=implementation,
        )
        return (out * probe).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    (got, got_gradients), (value, gradients) = run(implementation, q, k, v), run("xla", q, k, v)
    assert float(got) == pytest.approx(float(value), abs=1e-3)
    for mine, reference in zip(got_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5)


@pytest.mark.parametrize("length", [60, 200])
def test_a_row_without_segments_sees_no_padding_behind_it(length: int) -> None:
    q, k, v = random_qkv(length=length)
    got = jax.jit(functools.partial(attend, implementation="splash"))(q, k, v)
    np.testing.assert_allclose(got, naive(q, k, v, None, causal=False), atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_the_kernel_are_those_of_the_blocks_that_its_mask_touches(causal: bool) -> None:
    for length in (1, 128, 577, 640, 641, 1024, 1664, 2048):
        block, padded = splash.block_sizes(length)
        assert block % 128 == 0
        assert block <= splash.MAX_BLOCK
        assert length <= padded < length + 128 * (padded // block)
        for longest in (None, 1, 2, 130, 513, 4096):
            at = np.arange(padded)
            distance = at[:, None] - at
            reach = padded if longest is None else longest - 1
            seen = (distance <= reach) & (distance >= (0 if causal else -reach))
            blocks = seen.reshape(padded // block, block, -1, block).any(axis=(1, 3))
            got = splash.splash_pairs(length, causal=causal, max_segment_length=longest)
            assert got == blocks.sum() * block**2, (length, longest)


def test_far_keys_of_other_segments_are_not_read_in_a_causal_row() -> None:
    length = 3 * QUERY_BLOCK
    ids = jnp.asarray(np.repeat(np.arange(1, 13), length // 12)[None].repeat(2, axis=0), jnp.int32)
    q, k, v = random_qkv(length=length)
    expected = naive(q, k, v, ids, causal=True)
    # Read and masked, it would be zero times NaN.
    v = v.at[:, :QUERY_BLOCK].set(jnp.nan)
    run = functools.partial(attend, causal=True, max_segment_length=length, implementation="blocks")
    got = jax.jit(run)(q, k, v, segment_ids=ids)
    np.testing.assert_allclose(got[:, 2 * QUERY_BLOCK :], expected[:, 2 * QUERY_BLOCK :], atol=2e-6)


ROWS = ("batch", None, "heads", None)
IMAGES = ("images", None, None, None)


@pytest.mark.parametrize(
    ("heads", "axes"),
    [(4, ROWS), (3, ROWS), (4, IMAGES)],  # 3 heads and 2 images do not divide over the devices
)
@pytest.mark.parametrize("implementation", ["splash", "blocks"])
def test_shards_of_a_mesh(implementation: str, heads: int, axes: Axes) -> None:
    require_eight_devices()
    q, k, v = random_qkv(heads=heads, kv_heads=heads, length=128)
    expected = attend(q, k, v, segment_ids=segments(128), causal=True)
    with sharding.use_mesh(sharding.make_mesh(1, 2, 2)):
        run = functools.partial(attend, causal=True, axes=axes, implementation=implementation)
        got = jax.jit(run)(q, k, v, segment_ids=segments(128))
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "splash", "blocks"])
def test_branches_on_shards_of_a_mesh(implementation: str) -> None:
    require_eight_devices()
    q, k, v = random_qkv(heads=4, kv_heads=4, length=150)
    segment_ids, branch_ids = branched_rows(150, 40)
    expected = naive(q, k, v, segment_ids, True, branch_ids)
    with sharding.use_mesh(sharding.make_mesh(1, 2, 2)):
        run = functools.partial(attend, causal=True, implementation=implementation)
        got = jax.jit(run)(q, k, v, segment_ids=segment_ids, branch_ids=branch_ids)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["one", "segments", "branches"])
def test_cudnn_lowers_for_gpus(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the function lowered for one must contain cuDNN's fused attention."""
    # JAX asks the machine for its cuDNN before it builds the program for another one.
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda _: True)
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(length=128, width=64))
    of_kind: dict[str, tuple[jax.Array | None, jax.Array | None]] = {
        "one": (None, None),
        "segments": (segments(128), None),
        "branches": branched_rows(128, 40),
    }
    segment_ids, branch_ids = of_kind[kind]
    ids = {"segment_ids": segment_ids, "branch_ids": branch_ids}
    run = jax.jit(lambda q, k, v: attend(q, k, v, **ids, causal=True, implementation="cudnn"))
    text = run.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmha" in text


def test_wrong_requests_are_refused() -> None:
    q, k, v = random_qkv(length=100)
    with pytest.raises(ValueError, match="branch_ids need segment_ids and causal=True"):
        attend(q, k, v, branch_ids=jnp.zeros((2, 100), jnp.int32), causal=True)
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        attend(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="scale and key_bias cannot be given together"):
        attend(q, k, v, key_bias=jnp.zeros((2, 100)), scale=1.0)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "blocks", "splash"])
def test_queries_may_be_scaled_before(implementation: str, branched: bool) -> None:
    q, k, v = random_qkv(length=150)
    segment_ids, branch_ids = branched_rows(150, 60)
    mask = {"segment_ids": segment_ids, "branch_ids": branch_ids if branched else None}
    got = attend(3 * q, k, v, causal=True, scale=1 / 12, implementation=implementation, **mask)
    expected = attend(q, k, v, causal=True, implementation="xla", **mask)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("preferred", "dtype", "head_dim", "expected"),
    [
        ("splash", "bfloat16", 128, "splash"),
        ("splash", "float32", 64, "splash"),
        ("splash", "bfloat16", 72, "splash"),  # SigLIP's heads
        ("splash", "bfloat16", 60, "xla"),
        ("splash", "bfloat16", 16, "xla"),
        ("cudnn", "bfloat16", 128, "cudnn"),
        ("cudnn", "float16", 72, "cudnn"),
        ("cudnn", "float32", 128, "xla"),
        ("cudnn", "bfloat16", 256, "xla"),
        ("cudnn", "bfloat16", 12, "xla"),
        ("blocks", "float32", 12, "blocks"),
        ("xla", "bfloat16", 128, "xla"),
    ],
)
def test_heads_get_the_preferred_backend_where_it_takes_them(
    preferred: str, dtype: str, head_dim: int, expected: str
) -> None:
    with tuning.use(Tuning(attention=preferred)):
        assert backend_for(jnp.dtype(dtype), head_dim) == expected

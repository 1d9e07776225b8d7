"""One layer of the LLaMA decoder, in the pieces between which attention happens."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from prumerge_jax.models.attention import attend
from prumerge_jax.models.attention.key_bias import with_columns
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.heads import join_heads, moves_heads, split_heads
from prumerge_jax.models.layers import AdapterConfig, Linear, RMSNorm, outputs_of
from prumerge_jax.models.quantisation import FORMATS, Format
from prumerge_jax.models.rotary import Rotation
from prumerge_jax.sharding.mesh import Axes, constrain


class KV(NamedTuple):
    """Keys and values of attention, [B, T, K, Dh] each."""

    k: jax.Array
    v: jax.Array


class QKV(NamedTuple):
    """Queries, keys and values: [B, T, H * Dh] and twice [B, T, K * Dh] as they are projected,
    [B, T, H, Dh] and twice [B, T, K, Dh] once they are split into heads."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """What attention over packed rows needs in addition to the hidden states.

    Attributes:
      rotation: rotary embedding of the positions.
      segment_ids: [B, T] int32; 0 is padding.
      branch_ids, max_segment_length, key_bias: see `attention.attend`.
    """

    rotation: Rotation
    segment_ids: jax.Array
    branch_ids: jax.Array | None = None
    max_segment_length: int | None = None
    key_bias: jax.Array | None = None


class DecoderLayer(nnx.Module):
    """A pre-norm block, in the pieces between which attention happens."""

    def __init__(
        self,
        config: TextConfig,
        *,
        adapter: AdapterConfig | None,
        quantize: Format | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = AttentionProjections(config, adapter=adapter, quantize=quantize, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = SwiGLU(config, adapter=adapter, quantize=quantize, rngs=rngs)

    def qkv_projections(self, x: jax.Array, dropout_key: jax.Array | None = None) -> QKV:
        """[B, T, D] -> queries, keys and values, not yet split into heads."""
        return self.self_attn.qkv(self.input_layernorm(x), dropout_key)

    def split_and_rotate(self, projected: QKV, by: Rotation, scale: float | None = None) -> QKV:
        """Projections -> heads; queries and keys are rotated, queries multiplied by `scale`."""
        head_dim = self.self_attn.head_dim
        q = split_heads(projected.q, head_dim, by if scale is None else by.times(scale))
        return QKV(q, split_heads(projected.k, head_dim, by), split_heads(projected.v, head_dim))

    def heads_of(self, projected: QKV, rows: PackedRows) -> QKV:
        """Projections of packed rows -> heads, wider where keys have a bias."""
        heads = self.split_and_rotate(projected, rows.rotation)
        if rows.key_bias is None:
            return heads
        return QKV(*with_columns(*heads, rows.key_bias))  # the cache keeps it with the keys

    def attend(self, projected: QKV, rows: PackedRows) -> tuple[jax.Array, KV]:
        """Projections of packed rows -> the attention output of every position [B, T, H, Dh], and
        the keys and values it came from, wider where keys have a bias."""
        head_dim, scale = self.self_attn.head_dim, None
        if rows.key_bias is None and moves_heads(projected.q.shape[-2], head_dim):
            # What rotates in float32 scales on the way; a pass of its own would round once more.
            heads, scale = self.split_and_rotate(projected, rows.rotation, head_dim**-0.5), 1.0
        else:
            heads = self.heads_of(projected, rows)
        attended = attend(
            *heads,
            segment_ids=rows.segment_ids,
            branch_ids=rows.branch_ids,
            causal=True,
            max_segment_length=rows.max_segment_length,
            scale=scale,
        )
        return attended[..., :head_dim], KV(heads.k, heads.v)

    def after_attention(
        self,
        x: jax.Array,
        attended: jax.Array,
        output_key: jax.Array | None = None,
        mlp_key: jax.Array | None = None,
    ) -> jax.Array:
        """Rows [B, T, D] and their attention output [B, T, H, Dh] -> [B, T, D]."""
        x = self.feed_forward(self.add_attention_output(x, attended, output_key), mlp_key)
        return constrain(x, "batch", None, None)

    def add_attention_output(
        self, x: jax.Array, attended: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Adds the projected attention output [B, T, H, Dh] to the residual [B, T, D]."""
        return x + self.self_attn.o_proj(join_heads(attended), dropout_key)

    def feed_forward(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return x + self.mlp(self.post_attention_layernorm(x), dropout_key)


class AttentionProjections(nnx.Module):
    """The four projections of grouped-query attention; the output's has no bias."""

    def __init__(
        self,
        config: TextConfig,
        *,
        adapter: AdapterConfig | None,
        quantize: Format | None,
        rngs: nnx.Rngs,
    ) -> None:
        width, inner = config.width, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        into, out = ("embed", "heads"), ("heads", "embed")
        self.head_dim = config.head_dim
        bias = config.qkv_bias

        def linear(d_in: int, d_out: int, axes: Axes, bias: bool) -> Linear:
            return Linear(
                d_in, d_out, axes, bias=bias, adapter=adapter, quantize=quantize, rngs=rngs
            )

        self.q_proj = linear(width, inner, into, bias)
        self.k_proj = linear(width, shared, into, bias)
        self.v_proj = linear(width, shared, into, bias)
        self.o_proj = linear(inner, width, out, False)

    def qkv(self, x: jax.Array, dropout_key: jax.Array | None) -> QKV:
        """[B, T, D] -> [B, T, H * Dh] and twice [B, T, K * Dh]."""
        return QKV(*outputs_of([self.q_proj, self.k_proj, self.v_proj], x, dropout_key))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        config: TextConfig,
        *,
        adapter: AdapterConfig | None,
        quantize: Format | None,
        rngs: nnx.Rngs,
    ) -> None:
        width, inner = config.width, config.mlp_width
        options: dict[str, Any] = {"adapter": adapter, "rngs": rngs}
        into, out = ("embed", "mlp"), ("mlp", "embed")
        self.gate_proj = Linear(width, inner, into, quantize=quantize, **options)
        self.up_proj = Linear(width, inner, into, quantize=quantize, **options)
        # Its input has outliers, which int8 activations would lose the others for.
        weight_only = quantize and FORMATS[quantize.stored_as]
        self.down_proj = Linear(inner, width, out, quantize=weight_only, **options)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        keys = split_key(dropout_key, 2)
        gate, up = outputs_of([self.gate_proj, self.up_proj], x, keys[0])
        return self.down_proj(jax.nn.silu(gate) * up, keys[1])


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys; that many Nones where there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))

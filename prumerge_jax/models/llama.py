"""The LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Two ways through the same layers. Rows (`__call__`, `read`, `prefill`) hold one or several packed
segments, each position sees the earlier ones of its own segment. Slots (`decode`) hold one growing
sequence each, whose keys and values live in a `KVCache`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.models.attention import attend, attend_to_cache
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.layers import AdapterConfig, Linear, RMSNorm, rematerialise, stack
from prumerge_jax.sharding.mesh import constrain, platform

Index = jax.Array | int
"""The number of a layer."""


class KVCache(NamedTuple):
    """Keys and values of every layer, each [L, B, S, K, D]; keys are rotated already."""

    k: jax.Array
    v: jax.Array


class Unfinished(NamedTuple):
    """Rows in the last layer, behind its attention.

    Attributes:
      x: [B, T, D], the layer's input.
      attended: [B, T, H, Dh], what its attention returned.
    """

    x: jax.Array
    attended: jax.Array


def empty_cache(config: TextConfig, slots: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros: `slots` sequences of up to `length` tokens."""
    shape = (config.num_layers, slots, length, config.num_kv_heads, config.head_dim)
    axes = (None, "batch", None, "heads", None)
    return KVCache(
        constrain(jnp.zeros(shape, dtype), *axes), constrain(jnp.zeros(shape, dtype), *axes)
    )


class Llama(nnx.Module):
    """A LLaMA language model (transformers `modeling_llama.py`).

    Attributes:
      layers: one layer whose weights carry a leading axis L, or a list (`inference_layout`).
    """

    layers: "DecoderLayer | nnx.List[DecoderLayer]"

    def __init__(
        self, config: TextConfig, *, adapter: AdapterConfig | None = None, rngs: nnx.Rngs
    ) -> None:
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.embed_tokens = nnx.Param(
            normal(rngs.params(), (config.vocab_size, config.width)),
            out_sharding=("vocab", "embed"),
        )
        self.layers = stack(
            lambda rngs: DecoderLayer(config, adapter=adapter, rngs=rngs), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.width, config.rms_norm_eps)
        self.lm_head = Linear(config.width, config.vocab_size, ("embed", "vocab"), rngs=rngs)

    def embed(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token ids [B, T] int32 -> embeddings [B, T, D] in the compute dtype."""
        return constrain(self.embed_tokens[...][ids].astype(dtype), "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states [..., D] -> next-token logits [..., V] float32."""
        return self.lm_head(hidden).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        implementation: str = "xla",
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Runs rows through all layers, which must be stacked, and the final norm.

        Args:
          x: [B, T, D] embeddings in the compute dtype.
          positions: [B, T] int32, rotary positions.
          segment_ids: [B, T] int32; 0 is padding.
          implementation: attention backend, see `attention.attend`.
          remat: see `layers.rematerialise`.
          dropout_key: where given, adapters drop their inputs (training).

        Returns:
          [B, T, D].
        """
        graphdef, weights = nnx.split(self.layers)
        rope = rotary(positions, self.config)
        x = without_padding(x, segment_ids)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.config.num_layers)

        def body(
            x: jax.Array, scanned: tuple[nnx.State, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            weights, key = scanned
            layer = nnx.merge(graphdef, weights)
            return layer(x, rope, segment_ids, implementation, key), None

        x, _ = jax.lax.scan(rematerialise(body, remat), x, (weights, keys))
        return self.norm(x)

    def read(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        max_segment_length: int | None = None,
        implementation: str = "xla",
    ) -> Unfinished:
        """`__call__` as far as positions need each other; `finish` does the rest for some of them.

        Most of the last layer is its feed-forward part, and scoring asks for few positions. See
        `attention.attend` for `max_segment_length`.
        """
        rope = rotary(positions, self.config)
        x = without_padding(x, segment_ids)

        def body(x: jax.Array, index: Index) -> tuple[jax.Array, None]:
            layer = self._layer(index)
            seen, _ = layer.attend(
                _projected(layer, x), rope, segment_ids, implementation, max_segment_length
            )
            return layer.rest(x, seen), None

        last = self.config.num_layers - 1
        x, _ = self._through_layers(body, x, last)
        layer = self._layer(last)
        seen, _ = layer.attend(
            _projected(layer, x), rope, segment_ids, implementation, max_segment_length
        )
        return Unfinished(x, seen)

    def finish(self, rows: Unfinished, index: jax.Array) -> jax.Array:
        """Final hidden states [M, D] of the positions index [M] int32 into the flattened rows."""
        x, attended = (part.reshape(-1, *part.shape[2:])[index][None] for part in rows)
        layer = self._layer(self.config.num_layers - 1)
        return self.norm(layer.feed_forward(layer.mix(x, attended))[0])

    def prefill(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        max_segment_length: int | None = None,
        implementation: str = "xla",
    ) -> tuple[jax.Array, KVCache]:
        """`__call__` that also returns the rows' keys and values, [L, B, T, K, D] each.

        See `attention.attend` for `max_segment_length`.
        """
        rope = rotary(positions, self.config)
        x = without_padding(x, segment_ids)

        def body(x: jax.Array, index: Index) -> tuple[jax.Array, KVCache]:
            layer = self._layer(index)
            seen, cache = layer.attend(
                _projected(layer, x), rope, segment_ids, implementation, max_segment_length
            )
            return layer.rest(x, seen), cache

        x, cache = self._through_layers(body, x, self.config.num_layers)
        return self.norm(x), cache

    def decode(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        lengths: jax.Array,
        *,
        implementation: str = "xla",
    ) -> tuple[jax.Array, KVCache]:
        """One new token per slot.

        Args:
          x: [B, 1, D] embeddings of the new tokens.
          positions: [B] int32, their rotary positions.
          cache: [L, B, S, K, D]; the new entries are written at index `lengths`.
          lengths: [B] int32, valid entries before this token; at S the write is dropped.
          implementation: attention backend, see `attention.attend_to_cache`.

        Returns:
          [B, 1, D] after the final norm, and the cache with one entry more per slot.
        """
        rope = rotary(positions[:, None], self.config)
        slots = jnp.arange(len(lengths))

        # The cache travels in the carry and is written in place; as a scanned input and output
        # it would be copied whole at every step.
        def body(
            carry: tuple[jax.Array, jax.Array, jax.Array], index: Index
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
            x, cache_k, cache_v = carry
            layer = self._layer(index)
            q, k, v = layer.heads(_projected(layer, x), rope)
            cache_k = cache_k.at[index, slots, lengths].set(k[:, 0].astype(cache_k.dtype))
            cache_v = cache_v.at[index, slots, lengths].set(v[:, 0].astype(cache_v.dtype))
            seen = attend_to_cache(
                q, cache_k, cache_v, index, lengths + 1, implementation=implementation
            )
            return (layer.feed_forward(layer.mix(x, seen)), cache_k, cache_v), None

        carry = (x, cache.k, cache.v)
        (x, k, v), _ = self._through_layers(body, carry, self.config.num_layers)
        return self.norm(x), KVCache(k, v)

    def _through_layers(
        self, body: Callable[[Any, Index], tuple[Any, Any]], carry: Any, count: int
    ) -> tuple[Any, Any]:
        """`jax.lax.scan` over the first `count` layers; one after another where they are a list."""
        if not isinstance(self.layers, nnx.List):
            return jax.lax.scan(body, carry, jnp.arange(count))
        outputs = []
        for index in range(count):
            carry, output = body(carry, index)
            outputs.append(output)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    def _layer(self, index: Index) -> "DecoderLayer":
        """One of the layers."""
        if isinstance(self.layers, nnx.List):
            return self.layers[int(index)]
        graphdef, weights = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda stacked: stacked[index], weights))


def _projected(layer: "DecoderLayer", x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`layer.project(x)`, whose products stay apart from what is done to their heads.

    XLA for TPUs would copy the projections' weights into another layout. Training does without: its
    weights are gathered into the layout that suits, and backward a barrier costs copies of its own.
    """
    return jax.lax.optimization_barrier(layer.project(x))


class DecoderLayer(nnx.Module):
    """A pre-norm block: whole for rows, and in the pieces between which attention happens."""

    def __init__(
        self, config: TextConfig, *, adapter: AdapterConfig | None, rngs: nnx.Rngs
    ) -> None:
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = Projections(config, adapter=adapter, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = SwiGLU(config, adapter=adapter, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array,
        implementation: str,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Rows [B, T, D] -> [B, T, D]."""
        drop = split_key(dropout_key, 3)
        seen, _ = self.attend(self.project(x, drop[0]), rope, segment_ids, implementation)
        return self.rest(x, seen, drop[1], drop[2])

    def project(
        self, x: jax.Array, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> q [B, T, H * Dh], k and v [B, T, K * Dh]."""
        return self.self_attn.qkv(self.input_layernorm(x), dropout_key)

    def heads(
        self,
        projected: tuple[jax.Array, jax.Array, jax.Array],
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `project` returned -> q [B, T, H, Dh], k and v [B, T, K, Dh]; q and k rotated."""
        split = (*projected[0].shape[:2], -1, self.self_attn.head_dim)
        q, k, v = (x.reshape(split) for x in projected)
        return rotate(q, rope), rotate(k, rope), v

    def attend(
        self,
        projected: tuple[jax.Array, jax.Array, jax.Array],
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array,
        implementation: str,
        max_segment_length: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """What `project` returned for rows -> what each position sees of its segment [B, T, H, Dh],
        and keys and values [B, T, K, Dh]."""
        q, k, v = self.heads(projected, rope)
        seen = attend(
            q,
            k,
            v,
            segment_ids=segment_ids,
            causal=True,
            max_segment_length=max_segment_length,
            implementation=implementation,
        )
        return seen, KVCache(k, v)

    def rest(
        self,
        x: jax.Array,
        attended: jax.Array,
        mix_key: jax.Array | None = None,
        feed_forward_key: jax.Array | None = None,
    ) -> jax.Array:
        """Rows behind attention: [B, T, D] and attention's result [B, T, H, Dh] -> [B, T, D]."""
        x = self.feed_forward(self.mix(x, attended, mix_key), feed_forward_key)
        return constrain(x, "batch", None, None)

    def mix(
        self, x: jax.Array, attended: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Adds attention's result [B, T, H, Dh] to the residual [B, T, D]."""
        flat = attended.reshape(*attended.shape[:2], -1)
        return x + self.self_attn.o_proj(flat, dropout_key)

    def feed_forward(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return x + self.mlp(self.post_attention_layernorm(x), dropout_key)


class Projections(nnx.Module):
    """The four projections of grouped-query attention, none with bias."""

    def __init__(
        self, config: TextConfig, *, adapter: AdapterConfig | None, rngs: nnx.Rngs
    ) -> None:
        width, inner = config.width, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        into, out = ("embed", "heads"), ("heads", "embed")
        self.head_dim = config.head_dim
        self.q_proj = Linear(width, inner, into, adapter=adapter, rngs=rngs)
        self.k_proj = Linear(width, shared, into, adapter=adapter, rngs=rngs)
        self.v_proj = Linear(width, shared, into, adapter=adapter, rngs=rngs)
        self.o_proj = Linear(inner, width, out, adapter=adapter, rngs=rngs)

    def qkv(
        self, x: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> [B, T, H * Dh] and twice [B, T, K * Dh]."""
        keys = split_key(dropout_key, 3)
        return self.q_proj(x, keys[0]), self.k_proj(x, keys[1]), self.v_proj(x, keys[2])


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: TextConfig, *, adapter: AdapterConfig | None, rngs: nnx.Rngs
    ) -> None:
        width, inner = config.width, config.mlp_width
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), adapter=adapter, rngs=rngs)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), adapter=adapter, rngs=rngs)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), adapter=adapter, rngs=rngs)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        keys = split_key(dropout_key, 3)
        gated = jax.nn.silu(self.gate_proj(x, keys[0])) * self.up_proj(x, keys[1])
        return self.down_proj(gated, keys[2])


def without_padding(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Zeroes x [B, T, D] where segment_ids [B, T] is 0: masked attention still multiplies values
    by zero, and 0 * NaN is NaN."""
    return jnp.where(segment_ids[..., None] > 0, x, 0)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys, or as many Nones where there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def rotary(positions: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding for positions [B, T], each [B, T, Dh] float32.

    Both halves of the last axis have the same angles; in the first one sines have the other sign.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates heads [B, T, H, Dh], pairing dimension i with i + Dh/2 (HF's layout)."""
    cos, sin = (part[:, :, None, :] for part in rope)
    return (x.astype(jnp.float32) * cos + swapped(x) * sin).astype(x.dtype)


def swapped(x: jax.Array) -> jax.Array:
    """[B, T, H, Dh] -> float32, the two halves of the last axis in each other's place."""
    half = x.shape[-1] // 2
    if platform() != "tpu":
        return jnp.roll(x.astype(jnp.float32), half, axis=-1)
    # The matrix unit moves lanes faster than the vector unit does, and as exactly.
    order = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=-1)
    return jnp.einsum("bthd,de->bthe", x, order, precision="highest").astype(jnp.float32)

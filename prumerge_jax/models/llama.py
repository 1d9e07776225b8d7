"""The decoder of LLaMA, Mistral and Qwen2: RMSNorm, rotary positions, grouped queries, SwiGLU.

Two ways through the same layers:

* Packed rows hold one or several segments each, and a position sees the earlier ones of its own
  segment. One pass (`Llama._rows`) serves training (`__call__`), scoring (`hidden_before_last_mlp`
  and `last_mlp_at`) and the prompts of generation (`prefill`).
* Slots (`decode`) hold one growing sequence each, whose keys and values are in pages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.models import tuning
from prumerge_jax.models.attention import KVPages, attend_to_pages, write_to_pages
from prumerge_jax.models.attention.key_bias import with_columns
from prumerge_jax.models.attention.masks import causal_mask, segment_mask
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.decoder_layer import KV, QKV, DecoderLayer, PackedRows, split_key
from prumerge_jax.models.layers import AdapterConfig, Linear, RMSNorm, stack
from prumerge_jax.models.products import contract
from prumerge_jax.models.quantisation import Format
from prumerge_jax.models.remat import rematerialise
from prumerge_jax.models.rotary import rotation
from prumerge_jax.models.token_drops import DroppingRows, DropPlan, attention_of
from prumerge_jax.sharding.mesh import constrain, unshard_embed

Index = jax.Array | int
"""Number of a layer."""
_Kept = jax.Array | None


class PartialHidden(NamedTuple):
    """Rows in the last layer, after its attention.

    Attributes:
      x: [B, T, D], the layer's input.
      attended: [B, T, H, Dh], the output of its attention.
    """

    x: jax.Array
    attended: jax.Array


class Llama(nnx.Module):
    """A LLaMA language model (transformers `modeling_llama.py`), or a relative by configuration.

    Attributes:
      lm_head: None where the embedding is the head too.
      layers: one layer whose weights carry a leading axis L, or a list (`llava.inference_layout`).
    """

    layers: DecoderLayer | nnx.List

    def __init__(
        self,
        config: TextConfig,
        *,
        adapter: AdapterConfig | None = None,
        quantize: Format | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.embed_tokens = nnx.Param(
            normal(rngs.params(), (config.vocab_size, config.width)),
            out_sharding=("vocab", "embed"),
        )
        self.layers = stack(
            lambda rngs: DecoderLayer(config, adapter=adapter, quantize=quantize, rngs=rngs),
            config.num_layers,
            rngs,
        )
        self.norm = RMSNorm(config.width, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tied_head
            else Linear(config.width, config.vocab_size, ("embed", "vocab"), rngs=rngs)
        )

    @jax.named_scope("embedding")
    def embed(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token ids [B, T] int32 -> embeddings [B, T, D] in the compute dtype."""
        return constrain(self.embed_tokens[...][ids].astype(dtype), "batch", None, None)

    @jax.named_scope("head")
    def logits(self, hidden: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Final hidden states [..., D] -> next-token logits [..., V] float32.

        Args:
          hidden: the states.
          weight: `head_weight`, where several calls share it.
        """
        weight = self.head_weight(hidden.dtype) if weight is None else weight
        out_first = self.lm_head is None or self.lm_head.out_first
        return contract(hidden, weight, out_first=out_first).astype(jnp.float32)

    @jax.named_scope("head")
    def head_weight(self, dtype: jnp.dtype) -> jax.Array:
        """The head's kernel, gathered; [V, D] where it is the embedding or `out_first`."""
        if self.lm_head is not None:
            return self.lm_head.gathered_kernel(dtype)
        return unshard_embed(self.embed_tokens[...].astype(dtype), "vocab", "embed")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        key_bias: jax.Array | None = None,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Runs packed rows through all layers and the final norm; the form to be differentiated.

        Args:
          x: [B, T, D] embeddings in the compute dtype.
          positions: [B, T] int32, rotary positions.
          segment_ids: [B, T] int32; 0 is padding.
          key_bias: see `attention.attend`.
          remat: see `remat.rematerialise`; takes effect on stacked layers.
          dropout_key: where given, adapters drop their inputs (training).

        Returns:
          [B, T, D].
        """
        rows = PackedRows(rotation(positions, self.config), segment_ids, key_bias=key_bias)
        x = without_padding(x, segment_ids)
        x, _ = self._rows(x, rows, remat=remat, dropout_key=dropout_key)
        return self.norm(x)

    def prefill(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        pages: KVPages,
        places: jax.Array,
        *,
        branch_ids: jax.Array | None = None,
        key_bias: jax.Array | None = None,
        drop_plan: DropPlan | None = None,
        max_segment_length: int | None = None,
    ) -> tuple[jax.Array, KVPages]:
        """Final hidden states [B, T, D] of packed rows, whose keys and values go into pages.

        Args:
          x, positions, segment_ids: as in `__call__`.
          pages: the pool.
          places: [B, T] int32, see `attention.write_to_pages`.
          branch_ids, key_bias, max_segment_length: see `attention.attend`.
          drop_plan: what leaves the layers; then there are no branches and no other bias.
        """
        at = rotation(positions, self.config)
        rows = PackedRows(at, segment_ids, branch_ids, max_segment_length, key_bias)
        x = without_padding(x, segment_ids)
        dropping, kept = self._dropping(x, rows, positions, drop_plan)

        # The pool travels in the carry and is written in place.
        def body(
            carry: tuple[jax.Array, KVPages, _Kept], layer: DecoderLayer, index: Index, _: None
        ) -> tuple[tuple[jax.Array, KVPages, _Kept], None]:
            x, pages, kept = carry
            x, attended, kv, kept = _attend(layer, index, x, rows, dropping, kept)
            pages = write_to_pages(pages, kv.k, kv.v, index, self.config.num_layers, places)
            return (layer.after_attention(x, attended), pages, kept), None

        (x, pages, _), _ = self._through_layers(body, (x, pages, kept), self.config.num_layers)
        return self.norm(x), pages

    def hidden_before_last_mlp(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        branch_ids: jax.Array | None = None,
        key_bias: jax.Array | None = None,
        drop_plan: DropPlan | None = None,
        max_segment_length: int | None = None,
    ) -> PartialHidden:
        """Packed rows up to the last layer's attention; `last_mlp_at` computes the rest for some.

        Most of the last layer is its MLP, and scoring asks for few positions. Arguments as in
        `prefill`.
        """
        at = rotation(positions, self.config)
        rows = PackedRows(at, segment_ids, branch_ids, max_segment_length, key_bias)
        last = self.config.num_layers - 1
        x = without_padding(x, segment_ids)
        dropping, kept = self._dropping(x, rows, positions, drop_plan)
        x, kept = self._rows(x, rows, num_layers=last, dropping=dropping, kept=kept)
        x, attended, _, _ = _attend(self._layer(last), last, x, rows, dropping, kept)
        return PartialHidden(x, attended)

    def last_mlp_at(self, hidden: PartialHidden, index: jax.Array) -> jax.Array:
        """Final hidden states [M, D] of the positions index [M] int32 into the flattened rows."""
        x, attended = (part.reshape(-1, *part.shape[2:])[index][None] for part in hidden)
        layer = self._layer(self.config.num_layers - 1)
        return self.norm(layer.feed_forward(layer.add_attention_output(x, attended))[0])

    def attention_from(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        raters: jax.Array,
        *,
        key_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attention that every token gets from some, mean over heads, [L, B, T] float32.

        Args:
          x, positions, segment_ids, key_bias: as in `prefill`.
          raters: [B, T] float32, weights of the tokens whose attention it is.
        """
        rows = PackedRows(rotation(positions, self.config), segment_ids, key_bias=key_bias)
        same = segment_mask(segment_ids)
        assert same is not None
        seen = same[:, 0] & causal_mask(x.shape[1])

        def body(
            x: jax.Array, layer: DecoderLayer, index: Index, _: None
        ) -> tuple[jax.Array, jax.Array]:
            projected = layer.qkv_projections(x)
            heads = layer.heads_of(projected, rows)
            got = attention_of(heads.q, heads.k, raters, seen)
            attended = layer.attend(projected, rows)[0]
            return layer.after_attention(x, attended), got

        x = without_padding(x, segment_ids)
        return self._through_layers(body, x, self.config.num_layers)[1]

    def decode(
        self,
        x: jax.Array,
        positions: jax.Array,
        pages: KVPages,
        tables: jax.Array,
        places: jax.Array,
        lengths: jax.Array,
    ) -> tuple[jax.Array, KVPages]:
        """One new token per slot.

        Args:
          x: [B, 1, D] embeddings of the new tokens.
          positions: [B] int32, their rotary positions.
          pages: the pool.
          tables: [B, M] int32, the pages of every slot.
          places: [B] int32, where the new keys and values go; see `attention.write_to_pages`.
          lengths: [B] int32, valid tokens with this one; 0 for a slot that takes no part.

        Returns:
          [B, 1, D] after the final norm, and the pool with one token more per slot.
        """
        at = rotation(positions[:, None], self.config)
        count = self.config.num_layers
        has_bias = pages.k.shape[-1] > self.config.head_dim

        # The pool travels in the carry and is written in place; as a scanned input and output
        # all of it would be copied at every step.
        def body(
            carry: tuple[jax.Array, KVPages], layer: DecoderLayer, index: Index, _: None
        ) -> tuple[tuple[jax.Array, KVPages], None]:
            x, pages = carry
            heads = layer.split_and_rotate(_projection_barrier(layer.qkv_projections(x)), at)
            if has_bias:
                heads = QKV(*with_columns(*heads, jnp.zeros(x.shape[:2])))
            pages = write_to_pages(pages, heads.k, heads.v, index, count, places[:, None])
            attended = attend_to_pages(heads.q, pages, index, count, tables, lengths)
            attended = attended[..., : self.config.head_dim]
            x = layer.feed_forward(layer.add_attention_output(x, attended))
            return (x, pages), None

        (x, pages), _ = self._through_layers(body, (x, pages), count)
        return self.norm(x), pages

    def _rows(
        self,
        x: jax.Array,
        rows: PackedRows,
        *,
        num_layers: int | None = None,
        remat: str | None = None,
        dropout_key: jax.Array | None = None,
        dropping: DroppingRows | None = None,
        kept: _Kept = None,
    ) -> tuple[jax.Array, _Kept]:
        """Packed rows through layers: the one pass of training and scoring.

        Args:
          x: [B, T, D], zero at padding.
          rows: what attention needs.
          num_layers: how many of the first layers; by default all.
          remat: see `remat.rematerialise`; None is inference, of which no gradient is taken.
          dropout_key: where given, adapters drop their inputs.
          dropping, kept: see `_attend`; in inference.

        Returns:
          [B, T, D], before the final norm, and the tokens that are left.
        """
        count = self.config.num_layers if num_layers is None else num_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, count)

        def body(
            carry: tuple[jax.Array, _Kept], layer: DecoderLayer, index: Index, key: jax.Array | None
        ) -> tuple[tuple[jax.Array, _Kept], None]:
            x, kept = carry
            drop = split_key(key, 3)
            if remat is None:
                x, attended, _, kept = _attend(layer, index, x, rows, dropping, kept)
            else:
                attended = layer.attend(layer.qkv_projections(x, drop[0]), rows)[0]
            return (layer.after_attention(x, attended, drop[1], drop[2]), kept), None

        carry, _ = self._through_layers(body, (x, kept), count, keys=keys, remat=remat)
        return carry

    def _dropping(
        self, x: jax.Array, rows: PackedRows, positions: jax.Array, plan: DropPlan | None
    ) -> tuple[DroppingRows | None, _Kept]:
        """Rows whose visual tokens leave, and those of the first layer; twice None without a plan.

        x [B, T, D] has no padding that is not zero.
        """
        if plan is None:
            return None, None
        dropping = DroppingRows.before_layers(x, plan, self.config, rows, positions)
        return dropping, dropping.everything()

    def _through_layers(
        self,
        body: Callable[..., tuple[Any, Any]],
        carry: Any,
        count: int,
        *,
        keys: jax.Array | None = None,
        remat: str | None = None,
    ) -> tuple[Any, Any]:
        """`jax.lax.scan` over the first `count` layers; one after another where they are a list.

        Args:
          body: (carry, layer, its index, its key) -> (carry, output).
          carry: the first one.
          count: number of layers; all where `remat` is given.
          keys: one per layer; None gives every layer None.
          remat: as in `_rows`.

        Returns:
          The last carry, and the outputs stacked on a leading axis.
        """
        if isinstance(self.layers, nnx.List):
            outputs = []
            for index, layer in enumerate(self.layers[:count]):
                key = None if keys is None else keys[index]
                carry, output = body(carry, layer, index, key)
                outputs.append(output)
            return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs or [None])
        if remat is None:
            # Layers are read by index: a slice of the stack, to scan over, would be a copy.
            def at(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
                index, key = scanned
                return body(carry, self._layer(index), index, key)

            return jax.lax.scan(at, carry, (jnp.arange(count), keys))
        graphdef, weights = nnx.split(self.layers)

        # Scans over the weights, so that gradients come out stacked; by index, every layer's would
        # be added to a stack of zeros.
        def over(carry: Any, scanned: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            weights, index, key = scanned
            return body(carry, nnx.merge(graphdef, weights), index, key)

        scanned = (weights, jnp.arange(count), keys)
        return jax.lax.scan(rematerialise(over, remat), carry, scanned)

    def _layer(self, index: Index) -> DecoderLayer:
        """One of the layers."""
        if isinstance(self.layers, nnx.List):
            return self.layers[int(index)]
        graphdef, weights = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda stacked: stacked[index], weights))


def _attend(
    layer: DecoderLayer,
    index: Index,
    x: jax.Array,
    rows: PackedRows,
    dropping: DroppingRows | None,
    kept: _Kept,
) -> tuple[jax.Array, jax.Array, KV, _Kept]:
    """A layer's attention in inference: its input, output, keys and values, and the tokens left
    behind it.

    Args:
      layer, index: the layer and its number.
      x: [B, T, D], its input.
      rows: what attention needs.
      dropping: the same where visual tokens leave, else None.
      kept: [B, T] bool, the tokens that are left; None where none leaves.
    """
    if dropping is not None and kept is not None:
        return dropping.attend(layer, index, x, kept)
    attended, kv = layer.attend(_projection_barrier(layer.qkv_projections(x)), rows)
    return x, attended, kv, None


def _projection_barrier(projected: QKV) -> QKV:
    """The same projections; with `Tuning.projection_barrier` what is done to
    their heads does not influence how XLA lays out the weights."""
    if not tuning.current().projection_barrier:
        return projected
    return jax.lax.optimization_barrier(projected)


def without_padding(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Zeroes x [B, T, D] where segment_ids [B, T] is 0: masked attention still multiplies values
    by zero, and 0 * NaN is NaN."""
    return jnp.where(segment_ids[..., None] > 0, x, 0)

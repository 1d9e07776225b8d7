"""Weights and pages of a plan: shapes, dtypes and shardings, without a value."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.cost.bits import Bits
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models import attention
from prumerge_jax.models.attention import KVPages
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import abstract_in_stack
from prumerge_jax.models.quantisation import Format, QuantParam
from prumerge_jax.models.quantised_weights import CODES
from prumerge_jax.sharding.mesh import placed, use_mesh, weight_shardings


@dataclasses.dataclass(frozen=True)
class Held:
    """In what a plan holds a model.

    Attributes:
      dtype: of weights and computation.
      quantize: format of the decoder's kernels, or None.
      cache_dtype: dtype of keys and values, None for `dtype`.
    """

    dtype: jnp.dtype
    quantize: Format | None
    cache_dtype: jnp.dtype | None

    @property
    def page_dtype(self) -> jnp.dtype:
        """Dtype of keys and values."""
        return self.cache_dtype or self.dtype

    @property
    def bits(self) -> Bits:
        """For the cost model."""
        return Bits.of(
            None if self.quantize is None else self.quantize.name,
            None if self.cache_dtype is None else self.cache_dtype.name,
        )


def abstract_weights(model: LlavaConfig, mesh: Mesh, held: Held) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure and its weights as shapes with shardings, as `Llava.load` lays them."""
    with use_mesh(mesh):
        graphdef, abstract = abstract_in_stack(model, held.quantize)
    shardings = dict(nnx.to_flat_state(weight_shardings(abstract, mesh)))
    return graphdef, nnx.from_flat_state(
        {
            path: leaf.replace(
                jax.ShapeDtypeStruct(
                    leaf.shape,
                    leaf.dtype if isinstance(leaf, QuantParam) else held.dtype,
                    sharding=shardings[path].get_value(),
                )
            )
            for path, leaf in nnx.to_flat_state(abstract)
        }
    )


def quantised_shapes(state: nnx.State, held: Held) -> set[tuple[int, int]]:
    """[d_in, d_out] of a chip's part of the kernels that are quantised by channel."""
    if held.quantize is None or held.quantize.block is not None:
        return set()
    codes = [leaf.get_value() for path, leaf in nnx.to_flat_state(state) if path[-1] == CODES]
    parts = (each.sharding.shard_shape(each.shape) for each in codes)
    return {(d_in, d_out) for *_, d_in, d_out in parts}


def abstract_pages(model: LlavaConfig, engine: EngineShapes, mesh: Mesh, held: Held) -> KVPages:
    """The pool as shapes with shardings."""
    dtype = held.page_dtype
    shapes = jax.eval_shape(
        lambda: attention.empty_pages(model.text, engine.pool_pages, engine.page_size, dtype)
    )
    spec = attention.pages_spec(model.text, dtype)
    return placed(shapes, NamedSharding(mesh, spec))

"""The jitted functions of an engine, compiled for a slice from shapes alone."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.aot.assumptions import MeanTokens, decoded_tokens
from prumerge_jax.aot.compile import (
    Program,
    compile_program,
    decoder_kernel_flops,
    tower_kernel_flops,
)
from prumerge_jax.aot.held import Held, abstract_pages, quantised_shapes
from prumerge_jax.cost import counts
from prumerge_jax.data.runs import TAPS
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import frame_form, has_edges, interpolates, token_slots
from prumerge_jax.engine.pages import pages_in
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models.attention import KVPages, tokens_read
from prumerge_jax.models.attention.pages import form_for
from prumerge_jax.models.attention.splash import splash_pairs
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import bytes_per_device, logical_spec, placed, use_mesh


@dataclasses.dataclass(frozen=True)
class EnginePrograms:
    """What an engine runs of a model on a mesh.

    Attributes:
      weights: structure and shapes, see `held.abstract_weights`.
      model: sizes, its images of the side that the reduction wants.
      shapes: of the programs.
      reduction: what happens to the visual tokens.
      mesh: devices of the slice.
      held: in what model and pages are held.
      visual_tokens: assumed mean per image.
      shares_prefixes: whether rows have branches.
    """

    weights: tuple[nnx.GraphDef, nnx.State]
    model: LlavaConfig
    shapes: EngineShapes
    reduction: Reduction
    mesh: Mesh
    held: Held
    visual_tokens: MeanTokens
    shares_prefixes: bool

    def within(self, memory: float) -> Self:
        """The same with no more pages than a chip of so many bytes has room for beside the weights,
        as `engine.pages.pages_that_fit` counts, and at least one sequence's."""
        shapes, shards = self.shapes, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        per_chip = pages_in(
            memory - bytes_per_device(self.weights[1]),
            self.model.text,
            shapes.page_size,
            self.held.page_dtype,
            self.mesh.shape["tensor"],
        )
        pages = shards * max(per_chip, shapes.pages_per_sequence)
        shapes = dataclasses.replace(shapes, pages=min(shapes.pool_pages, pages))
        return dataclasses.replace(self, shapes=shapes)

    @functools.cached_property
    def _pages(self) -> KVPages:
        with use_mesh(self.mesh):
            return abstract_pages(self.model, self.shapes, self.mesh, self.held)

    @functools.cached_property
    def _pool(self) -> jax.ShapeDtypeStruct:
        """Visual tokens of two windows."""
        width = self.model.vision.width + self.reduction.weighs_tokens
        slots = token_slots(self.model, self.reduction)
        return self._batch(2 * self.shapes.window_size, slots, width, dtype=self.held.dtype)

    @property
    def pool_bytes(self) -> int:
        """Bytes per chip of the pages of keys and values."""
        return bytes_per_device(self._pages)

    @property
    def resident(self) -> int:
        """Bytes per chip of weights, pages, and four windows of visual tokens."""
        return bytes_per_device((self.weights[1], self._pages, self._pool, self._pool))

    @functools.cached_property
    def _kernels(self) -> set[tuple[int, int]]:
        return quantised_shapes(self.weights[1], self.held)

    def _batch(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """The shape of an array that is split over the data shards."""
        spec = NamedSharding(self.mesh, logical_spec("batch"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

    def encode(self) -> Program:
        """A batch of crops to visual tokens."""
        model, size = self.model, self.shapes.batch_size
        side, patches = model.vision.image_size, model.vision.num_patches
        most = self.reduction.question_tokens
        edges = has_edges(model, self.reduction)
        differs = frame_form(model, self.reduction) is not None
        with use_mesh(self.mesh):
            lowered = programs.encode.lower(
                *self.weights,
                self._batch(size, side, side, 3, dtype=jnp.uint8),
                self._batch(size, most) if most else None,
                self._batch(size, patches, dtype=jnp.bool) if edges else None,
                reduction=self.reduction.for_crops(model.most_crops),
                dtype=self.held.dtype,
                slots=token_slots(model, self.reduction) if differs else None,
            )
            flops = tower_kernel_flops(model.vision, size, self.held.dtype) / self.mesh.size
            return compile_program("encode", lowered, flops)

    def read(self) -> Program:
        """Rows of text and visual tokens, for scoring."""
        with use_mesh(self.mesh):
            lowered = programs.hidden_before_last_mlp.lower(
                *self.weights,
                self._pool,
                self._rows(),
                max_segment_length=self.shapes.longest_prompt,
            )
            return compile_program("read", lowered, self._row_flops(), quantised=self._kernels)

    def prefill(self) -> Program:
        """Rows, whose keys and values go into pages."""
        shapes = self.shapes
        with use_mesh(self.mesh):
            lowered = programs.prefill.lower(
                *self.weights,
                self._pages,
                self._pool,
                self._rows(),
                self._batch(shapes.prefill_rows, shapes.row_length),
                max_segment_length=shapes.longest_prompt,
            )
            return compile_program("prefill", lowered, self._row_flops(), quantised=self._kernels)

    def decode(self) -> Program:
        """A call of several steps of all slots."""
        shapes = self.shapes
        with use_mesh(self.mesh):
            slots = jax.eval_shape(lambda: programs.empty_slots(slots=shapes.slots))
            lowered = programs.decode.lower(
                *self.weights,
                placed(slots, NamedSharding(self.mesh, logical_spec("batch"))),
                self._pages,
                self._batch(shapes.slots, shapes.table_width),
                self._batch(shapes.slots, dtype=jnp.bool),
                steps=shapes.decode_steps_per_call,
            )
            return compile_program(
                "decode",
                lowered,
                kernel_bytes=self._kernel_bytes() / self.mesh.size,
                quantised=self._kernels,
                steps=shapes.decode_steps_per_call,
            )

    def _rows(self) -> programs.Rows:
        shape = (self.shapes.prefill_rows, self.shapes.row_length)
        row = self._batch(*shape)
        rows = programs.Rows(row, row, row, row)
        if self.shares_prefixes:
            rows = rows._replace(branch_ids=row)
        if interpolates(self.model, self.reduction):
            weight = self._batch(*shape, TAPS, dtype=jnp.float32)
            rows = rows._replace(visual_index=self._batch(*shape, TAPS), visual_weight=weight)
        return rows

    def _row_flops(self) -> float:
        """FLOPs per chip of the attention kernel over the rows."""
        shapes = self.shapes
        pairs = splash_pairs(
            shapes.row_length, causal=True, max_segment_length=shapes.longest_prompt
        )
        if self.shares_prefixes:  # the kernel runs again, for what is in front of the branches
            pairs += splash_pairs(shapes.row_length, causal=True)
        flops = decoder_kernel_flops(self.model.text, shapes.prefill_rows, pairs, self.held.dtype)
        return flops / self.mesh.size

    def _kernel_bytes(self) -> float:
        """What the attention kernel of a decode step reads, on all chips together; 0 without."""
        dtype, text = self.held.page_dtype, self.model.text
        if form_for(dtype, text.head_dim) == "xla":
            return 0.0
        lengths = np.full(self.shapes.slots, round(decoded_tokens(self.visual_tokens)))
        tokens = tokens_read(lengths, self.shapes.page_size, dtype, text.head_dim)
        return tokens * counts.kv_bytes_per_token(text, self.held.bits)

"""Micro-batches of samples with several crops: tiles of images, several images, frames of videos.

The crops of a process's samples fill arrays of one shape, with room for `crops_per_sample` of each
sample on average; images and videos are in separate arrays where a model encodes them differently.
All crops of a sample are on its data shard, so that its tokens are gathered without communication.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.data import packing
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.runs import Run
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.data.visual_layout import CropTokens, run_of_picture, shared_lengths
from prumerge_jax.messages import quoted
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.mesh import constrain, logical_spec
from prumerge_jax.sharding.processes import addressable_rows, allgather_ints
from prumerge_jax.training.batches import BatchPacker, Planned, RowBatch, RowShape
from prumerge_jax.training.parts import EncoderInParts
from prumerge_jax.training.sample_sizes import kept_tokens

Encode = Callable[[jax.Array, jax.Array], VisualTokens]
"""Crops [B, S, S, 3] uint8 and, of images, [B, N] bool which patches lie on the image, of videos,
[B] bool which frames begin one, to their visual tokens."""


@dataclasses.dataclass(frozen=True)
class CropCapacity:
    """How many crops a batch has room for, and what their tokens are.

    Attributes:
      per_sample: mean number of crops of a sample that there is room for on every data shard.
      side: S, side of a crop in pixels.
      num_patches: N of a crop.
      cls: whether the last slot of a frame has the tower's CLS feature.
      reduction: what the encoders do, `for_crops` of the model.
      interpolates: whether rows may hold interpolated tokens.
    """

    per_sample: int
    side: int
    num_patches: int
    cls: bool
    reduction: Reduction
    interpolates: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Encoded:
    """The encoded crops of a batch.

    Attributes:
      visual: those of both kinds interleaved: crop j of kind k of K in row j K + k.
      rows: for each sample and image of it, the rows of its crops on this process.
    """

    visual: VisualTokens
    rows: list[list[list[int]]]


class CropPacker(BatchPacker):
    """Encodes, packs and places the batches of a run whose samples have pictures.

    Args:
      encoders: of images; and of videos, where they are encoded in another way.
      capacity: room for crops.
      shape, mesh: as in `BatchPacker`.
    """

    def __init__(
        self, encoders: Sequence[Encode], *, capacity: CropCapacity, shape: RowShape, mesh: Mesh
    ) -> None:
        super().__init__(encoders[0], num_patches=capacity.num_patches, shape=shape, mesh=mesh)
        others = (EncoderInParts(encode, mesh) for encode in encoders[1:])
        self._encoders = [self._encode, *others]
        self._capacity = capacity
        self._join = jax.jit(_interleaved, out_shardings=NamedSharding(mesh, logical_spec("batch")))

    def _encoded(self, examples: Sequence[Example]) -> _Encoded:
        local, kinds = len(self._shards.local), len(self._encoders)
        per_shard = self._capacity.per_sample * len(examples) // local
        size, side = per_shard * local, self._capacity.side
        pixels = np.zeros((kinds, size, side, side, 3), np.uint8)
        on_image = np.ones((kinds, size, self._capacity.num_patches), bool)
        first = np.ones((kinds, size), bool)
        used = np.zeros((kinds, local), int)
        rows: list[list[list[int]]] = []
        for number, example in enumerate(examples):
            shard = number * local // len(examples)
            rows.append([])
            for crops, layout in example.pictures:
                kind = self._kind(layout)
                start = shard * per_shard + used[kind, shard]
                used[kind, shard] += len(crops)
                if used[kind, shard] > per_shard:
                    raise ValueError(self._too_many(examples, local))
                here = slice(start, start + len(crops))
                pixels[kind, here] = crops
                first[kind, here] = np.arange(len(crops)) == 0
                if not layout.frames:
                    on_image[kind, here] = layout.on_image()
                rows[-1].append([row * kinds + kind for row in range(here.start, here.stop)])
        # A tower is one computation of all processes: it runs as often as any of them needs it.
        most = np.max(allgather_ints(used.max(axis=1).tolist()), axis=0)
        of_kinds = [
            encode(pixels[kind], (on_image, first)[kind][kind], used=int(most[kind]))
            for kind, encode in enumerate(self._encoders)
        ]
        return _Encoded(self._join(of_kinds), rows)

    def _too_many(self, examples: Sequence[Example], local: int) -> str:
        per_shard, most = len(examples) // local, 0
        for kind in range(len(self._encoders)):
            crops = [
                sum(len(p.crops) for p in example.pictures if self._kind(p.layout) == kind)
                for example in examples
            ]
            most = max(most, int(np.reshape(crops, (local, per_shard)).sum(axis=1).max()))
        return (
            f"the samples of a batch from {quoted(examples[0].id)} on have up to {most} crops or "
            f"frames on a data shard, there is room for {self._capacity.per_sample * per_shard}; "
            f"set config.crops_per_sample to at least {-(-most // per_shard)}"
        )

    def _kind(self, layout: Layout) -> int:
        """The number of the encoder for pictures of this layout."""
        return int(layout.frames > 0) if len(self._encoders) > 1 else 0

    def _plan(self, examples: Sequence[Example], encoded: Any, places: np.ndarray) -> Planned:
        crops = self._crops(examples, encoded)
        selects = self._capacity.reduction.selects_patches
        runs = [
            [
                run_of_picture(crops, layout, rows, selects_patches=selects)
                for (_, layout), rows in zip(e.pictures, of, strict=True)
            ]
            for e, of in zip(examples, encoded.rows, strict=True)
        ]
        requests = [
            fit_pictures(example, of_example, self._shape.length)
            for example, of_example in zip(examples, runs, strict=True)
        ]
        return self._packed(
            requests,
            crops.num_slots,
            encoded.visual.tokens,
            sum(len(run) for of_example in runs for run in of_example),
            with_taps=self._capacity.interpolates,
        )

    def _crops(self, examples: Sequence[Example], encoded: _Encoded) -> CropTokens:
        """What the planner must know of the encoded crops; errors as in `BatchPacker`."""
        required = addressable_rows(encoded.visual.required)
        slots = encoded.visual.tokens.shape[1] - self._capacity.cls
        for example, of_example in zip(examples, encoded.rows, strict=True):
            needed = required[[row for rows in of_example for row in rows]]
            self._check_required(example, needed, slots)
        lengths, content = addressable_rows(encoded.visual.lengths), encoded.visual.content
        if content is not None:
            pictures = (
                (picture.layout, rows)
                for example, of_example in zip(examples, encoded.rows, strict=True)
                for picture, rows in zip(example.pictures, of_example, strict=True)
            )
            reduction = self._capacity.reduction
            lengths = shared_lengths(lengths, addressable_rows(content), pictures, reduction)
        return CropTokens(
            lengths,
            addressable_rows(encoded.visual.patch_indices),
            self._num_patches,
            cls_slot=slots if self._capacity.cls else None,
            raster=content is not None,
        )

    def _place(self, window: Any, visual_tokens: jax.Array, image_rows: np.ndarray) -> RowBatch:
        crop_rows = np.array(self._shards.rows(visual_tokens.shape[0]))
        return self._place_rows(window, visual_tokens, crop_rows)


def fit_pictures(example: Example, runs: Sequence[Run], length: int) -> packing.Request:
    """The longest beginning of a sample that fits into `length` tokens; see `kept_tokens`."""
    is_image = example.token_ids == IMAGE_TOKEN
    kept = kept_tokens(example.token_ids, np.array([len(run) for run in runs], np.int64), length)
    shown = int(is_image[:kept].sum())
    return packing.Request(example.token_ids[:kept], tuple(runs[:shown]), example.labels[:kept])


def _interleaved(kinds: Sequence[VisualTokens]) -> VisualTokens:
    """Row j of kind k of K becomes row j K + k; on a mesh no crop leaves its device."""

    def join(*arrays: jax.Array) -> jax.Array:
        stacked = jnp.stack(arrays, axis=1)
        joined = stacked.reshape(-1, *stacked.shape[2:])
        return constrain(joined, "batch", *[None] * (joined.ndim - 1))

    return jax.tree.map(join, *kinds)

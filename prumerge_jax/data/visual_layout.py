"""Runs: which visual tokens stand where a prompt has its image, and at which positions.

The only place that knows how a model family lays out an image. Packing takes the runs as they are.

Shapes: B crops of the encoded batch, R capacity (visual token slots per crop), N patches.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from prumerge_jax.data.packing import Run


@dataclasses.dataclass(frozen=True, eq=False)
class CropTokens:
    """What the host knows of the visual tokens of encoded crops: counts and places, not values.

    Attributes:
      lengths: int32 [B], valid visual tokens per crop, the extra token included.
      patch_indices: int32 [B, R], the patch each visual token came from; -1 for the extra token.
      num_patches: N, the patches of an unreduced crop.

    Raises:
      ValueError: the shapes do not fit, or a length is outside of 0 to R.
    """

    lengths: np.ndarray
    patch_indices: np.ndarray
    num_patches: int

    def __post_init__(self) -> None:
        if self.patch_indices.ndim != 2 or self.lengths.shape != self.patch_indices.shape[:1]:
            raise ValueError(
                f"lengths {self.lengths.shape} and patch_indices {self.patch_indices.shape} "
                "do not fit; expected [B] and [B, R]"
            )
        outside = np.flatnonzero((self.lengths < 0) | (self.lengths > self.capacity))
        if outside.size:
            crop = int(outside[0])
            raise ValueError(
                f"image row {crop} has {self.lengths[crop]} visual tokens; expected 0 to "
                f"{self.capacity}, the capacity it was encoded with"
            )

    @property
    def capacity(self) -> int:
        """R, the visual token slots per crop."""
        return self.patch_indices.shape[1]

    @property
    def num_slots(self) -> int:
        """B * R, the slots of all crops together."""
        return self.patch_indices.size


def runs(crops: CropTokens, rows: Iterable[int]) -> tuple[Run, ...]:
    """The run of each image that is the one crop in row b of the encoded batch, as in LLaVA-1.5.

    Its tokens stand in the order of their slots. Of the N positions of the whole image each takes
    that of its patch, the extra token that of the last patch.

    Args:
      crops: the encoded batch.
      rows: b of each image.

    Raises:
      ValueError: the batch has no such row.
    """
    return tuple(_single_crop(crops, row) for row in rows)


def _single_crop(crops: CropTokens, row: int) -> Run:
    if not 0 <= row < crops.lengths.size:
        raise ValueError(f"image row {row}; the encoded batch has {crops.lengths.size}")
    slot = np.arange(crops.lengths[row], dtype=np.int32)
    patch = crops.patch_indices[row, slot]
    return Run(
        index=row * crops.capacity + slot,
        offset=np.where(patch < 0, crops.num_patches - 1, patch).astype(np.int32),
        span=crops.num_patches,
    )

"""The order of LLaVA's `group_by_modality_length`: batches of pictures and batches of text.

The reference also sorts each global batch by length and deals it to the devices. Batches are
packed here, so within a batch neither matters, and what is left is which samples share a batch:
those of either kind are shuffled and cut into batches, the batches of both kinds are shuffled, and
the remainders form the last, mixed ones. The distribution is that of the reference, the order
itself depends on torch's generator and is not reproduced.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ModalityOrder:
    """Maps a place in an endless stream to the index of the sample there.

    Attributes:
      has_image: bool [n], of every sample.
      batch_size: global; an epoch is cut to whole batches.
      seed: decides the order of every epoch.
    """

    has_image: np.ndarray
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.has_image) < self.batch_size:
            raise ValueError(
                f"{len(self.has_image)} samples do not fill one batch of {self.batch_size}"
            )

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return len(self.has_image) // self.batch_size * self.batch_size

    def __call__(self, place: int) -> int:
        """The sample at a place, counted over all epochs."""
        epoch, index = divmod(place, self.epoch_size)
        return int(_draw_epoch(self, epoch)[index])


@functools.lru_cache(maxsize=2)  # reading ahead touches two epochs at most
def _draw_epoch(order: ModalityOrder, epoch: int) -> np.ndarray:
    random = np.random.default_rng([order.seed, epoch])
    batches, remainders = [], []
    for kind in (order.has_image, ~order.has_image):
        indices = random.permutation(np.flatnonzero(kind))
        full = len(indices) // order.batch_size * order.batch_size
        batches.append(indices[:full].reshape(-1, order.batch_size))
        remainders.append(indices[full:])
    pure = random.permutation(np.concatenate(batches))
    mixed = random.permutation(np.concatenate(remainders))
    return np.concatenate([pure.ravel(), mixed])[: order.epoch_size]

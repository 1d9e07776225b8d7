"""Where the crops of a window's images go in the batches that are encoded.

Crop number i of a window is row i % B of batch i // B, of B = `batch_size`.
"""

import dataclasses

import numpy as np

from prumerge_jax.engine.request import ImageInput, Request
from prumerge_jax.engine.shapes import EngineShapes


@dataclasses.dataclass(eq=False)
class PlacedCrop:
    """One crop to encode.

    Attributes:
      pixels: uint8 [S, S, 3].
      on_image: bool [N], its patches that lie on the image.
      question_ids: int32 [M] of the request it is encoded for.
    """

    pixels: np.ndarray
    on_image: np.ndarray
    question_ids: np.ndarray


class WindowPlaces:
    """The requests of a window, and a place for each crop of their images.

    All crops of a request are on one data shard, so that its tokens are gathered without
    communication. The crops of a shard fill its rows in order.

    Attributes:
      requests: those that have been added.
      numbers: for each request and image of it, the numbers of the crops.
      crops: what to encode, by number.
      num_images: images to encode; those that requests share count once.
      refused: why a request cannot run in any window, by its key.
    """

    def __init__(
        self, shapes: EngineShapes, shards: int, *, grid: int, reads_question: bool = False
    ) -> None:
        """An empty window.

        Args:
          shapes: of the engine.
          shards: data shards of the mesh.
          grid: patches along a side of a crop.
          reads_question: whether images of different questions are encoded apart.
        """
        self._most_requests, self._batch_size = shapes.window_size, shapes.batch_size
        self._room = shapes.window_size // shards
        self._used = [0] * shards
        self._grid, self._reads_question = grid, reads_question
        self._known: dict[tuple[str, bytes, int], tuple[int, ...]] = {}
        self.requests: list[Request] = []
        self.numbers: list[tuple[tuple[int, ...], ...]] = []
        self.crops: dict[int, PlacedCrop] = {}
        self.num_images = 0
        self.refused: dict[int, str] = {}

    def add(self, request: Request) -> bool:
        """Adds a request, unless the window is full or has no room for its crops."""
        if len(self.requests) == self._most_requests:
            return False
        shards = range(len(self._used))
        new = [self._new_crops(request, shard) for shard in shards]
        # To images that are there already, else to the emptiest shard.
        shard = min(shards, key=lambda s: (new[s], self._used[s]))
        if self._used[shard] + new[shard] > self._room:
            shard = min(shards, key=lambda s: self._used[s] + new[s])
        if self._used[shard] + new[shard] > self._room:
            return False
        self.requests.append(request)
        self.numbers.append(tuple(self._place(i, request, shard) for i in request.images))
        return True

    def refuse(self, request: Request) -> None:
        """Adds a request that not even an empty window has room for, to be answered with why."""
        crops = sum(len(image.crops) for image in request.images)
        self.requests.append(request)
        self.numbers.append(())
        of_shard = " on each data shard" if len(self._used) > 1 else ""
        self.refused[request.key] = (
            f"the images have {crops} crops, a window has room for {self._room}{of_shard}; set "
            f"--config.engine.window_size to at least {crops * len(self._used)}"
        )

    def _key(self, image: ImageInput, request: Request, shard: int) -> tuple[str, bytes, int]:
        asked = request.question_ids.tobytes() if self._reads_question else b""
        return str(image.key), asked, shard

    def _new_crops(self, request: Request, shard: int) -> int:
        """Crops of a request that are not on a shard yet."""
        new: dict[object, int] = {}
        for image in request.images:
            key = self._key(image, request, shard)
            if image.key is None:
                new[id(image)] = new.get(id(image), 0) + len(image.crops)
            elif key not in self._known:
                new[key] = len(image.crops)
        return sum(new.values())

    def _place(self, image: ImageInput, request: Request, shard: int) -> tuple[int, ...]:
        key = self._key(image, request, shard)
        if image.key is not None and key in self._known:
            return self._known[key]
        first, per_batch = self._used[shard], self._batch_size // len(self._used)
        numbers = []
        for nth in range(first, first + len(image.crops)):
            batch, row = divmod(nth, per_batch)
            numbers.append(batch * self._batch_size + shard * per_batch + row)
        self._used[shard] += len(image.crops)
        self.num_images += 1
        on_image = image.layout_on(self._grid).on_image()
        for number, pixels, seen in zip(numbers, image.crops, on_image, strict=True):
            self.crops[number] = PlacedCrop(pixels, seen, request.question_ids)
        self._known[key] = tuple(numbers)
        return tuple(numbers)

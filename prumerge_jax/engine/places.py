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
      is_first: whether it begins an image or video.
    """

    pixels: np.ndarray
    on_image: np.ndarray
    question_ids: np.ndarray
    is_first: bool = True


@dataclasses.dataclass(eq=False)
class _Rows:
    """What is taken of a window's batches, as one shard sees it.

    Attributes:
      per_batch: rows of the shard in a batch.
      used: rows of the shard taken in each batch.
      is_video: for each batch of all shards, whether it is of videos; None while it is empty.
    """

    per_batch: int
    used: list[int]
    is_video: list[bool | None]

    def take(self, crops: int, is_video: bool, in_one_batch: bool) -> list[tuple[int, int]] | None:
        """Batch and row of so many crops, which are taken; None, and some taken, where there are
        too few."""
        taken: list[tuple[int, int]] = []
        for batch, used in enumerate(self.used):
            room = self.per_batch - used
            if self.is_video[batch] not in (None, is_video) or (in_one_batch and room < crops):
                continue
            here = min(room, crops - len(taken))
            taken += [(batch, used + row) for row in range(here)]
            if here:
                self.used[batch], self.is_video[batch] = used + here, is_video
            if len(taken) == crops:
                return taken
        return None


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
        self,
        shapes: EngineShapes,
        shards: int,
        *,
        grid: int,
        reads_question: bool = False,
        apart: bool = False,
        whole_videos: bool = False,
    ) -> None:
        """An empty window.

        Args:
          shapes: of the engine.
          shards: data shards of the mesh.
          grid: patches along a side of a crop.
          reads_question: whether images of different questions are encoded apart.
          apart: whether a batch holds either images or videos.
          whole_videos: whether all frames of a video are in one batch.
        """
        self._most_requests, self._batch_size = shapes.window_size, shapes.batch_size
        self._room = shapes.window_size // shards
        batches = shapes.window_size // shapes.batch_size
        self._is_video: list[bool | None] = [None] * batches
        self._used = [[0] * batches for _ in range(shards)]
        self._grid, self._reads_question = grid, reads_question
        self._apart, self._whole_videos = apart, whole_videos
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
        used = list(map(sum, self._used))
        new = [self._new_crops(request, shard) for shard in shards]
        # To images that are there already, else to the emptiest shard.
        nearest = min(shards, key=lambda s: (new[s], used[s]))
        for shard in (nearest, min(shards, key=lambda s: used[s] + new[s])):
            if used[shard] + new[shard] > self._room:
                continue
            rows = _Rows(self._per_batch, self._used[shard].copy(), self._is_video.copy())
            places = self._places_of(request, shard, rows)
            if places is not None:
                self._used[shard], self._is_video = rows.used, rows.is_video
                self.requests.append(request)
                self.numbers.append(self._fill(request, shard, places))
                return True
        return False

    def refuse(self, request: Request) -> None:
        """Adds a request that not even an empty window has room for, to be answered with why."""
        self.requests.append(request)
        self.numbers.append(())
        self.refused[request.key] = self._too_large(request)

    @property
    def _per_batch(self) -> int:
        """Rows of a shard in a batch."""
        return self._batch_size // len(self._used)

    def holds_videos(self, batch: int) -> bool:
        """Whether a batch is of videos alone."""
        return self._apart and self._is_video[batch] is True

    def _too_large(self, request: Request) -> str:
        shards = len(self._used)
        of_shard = " on each data shard" if shards > 1 else ""
        most = max((len(i.crops) for i in request.images if self._is_whole(i)), default=0)
        if most > self._per_batch:
            return (
                f"a video has {most} frames that are merged over time, a batch has room for "
                f"{self._per_batch}{of_shard}; set --config.engine.batch_size to at least "
                f"{most * shards}"
            )
        crops = sum(len(image.crops) for image in request.images)
        needed = crops * shards
        if needed <= self._room * shards:  # but not in batches of one kind each
            batches = [len(image.crops) for image in request.images]
            needed = self._batch_size * sum(-(-count // self._per_batch) for count in batches)
        return (
            f"the images have {crops} crops, a window has room for {self._room}{of_shard}; set "
            f"--config.engine.window_size to at least {needed}"
        )

    def _is_whole(self, image: ImageInput) -> bool:
        """Whether all crops of an image must be in one batch."""
        return self._whole_videos and _is_video(image)

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

    def _places_of(
        self, request: Request, shard: int, rows: _Rows
    ) -> list[list[tuple[int, int]] | None] | None:
        """Batch and row for the crops of every image of a request; None for one that has places,
        or that comes again. None if there are too few."""
        places: list[list[tuple[int, int]] | None] = []
        seen = set(self._known)
        for image in request.images:
            key = self._key(image, request, shard)
            if image.key is not None and key in seen:
                places.append(None)
                continue
            if image.key is not None:
                seen.add(key)
            kind = self._apart and _is_video(image)
            taken = rows.take(len(image.crops), kind, self._is_whole(image))
            if taken is None:
                return None
            places.append(taken)
        return places

    def _fill(
        self, request: Request, shard: int, places: list[list[tuple[int, int]] | None]
    ) -> tuple[tuple[int, ...], ...]:
        """Puts a request's crops in their places; the numbers of the crops of every image."""
        first = shard * self._per_batch
        numbers = []
        for image, taken in zip(request.images, places, strict=True):
            key = self._key(image, request, shard)
            if taken is None:
                numbers.append(self._known[key])
                continue
            own = tuple(batch * self._batch_size + first + row for batch, row in taken)
            on_image = image.layout_on(self._grid).on_image()
            for nth, number in enumerate(own):
                self.crops[number] = PlacedCrop(
                    image.crops[nth], on_image[nth], request.question_ids, nth == 0
                )
            self.num_images += 1
            self._known[key] = own
            numbers.append(own)
        return tuple(numbers)


def _is_video(image: ImageInput) -> bool:
    return image.layout is not None and image.layout.frames > 0

"""Image files to pixels in worker processes, in order and ahead of their use."""

import collections
import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from prumerge_jax.data.images import ImageError, ImageMode, ImageSource, load_image, preprocess

TIMEOUT_SECONDS = 120
"""After so long a worker is taken to hang on its image."""

Named = tuple[str, ImageSource]
"""What to call an image in an error, and where it is."""


def load_pixels(
    named: Named, size: int, mode: ImageMode, mean: Sequence[float]
) -> np.ndarray | ImageError:
    """uint8 [size, size, 3], or the error that says why not."""
    name, source = named
    try:
        return preprocess(load_image(source, name), size, mode, mean)
    except ImageError as error:
        return error


def stream_pixels(
    images: Iterable[Named | None],
    *,
    size: int,
    mode: ImageMode,
    mean: Sequence[float],
    num_workers: int,
    ahead: int = 64,
) -> Iterator[np.ndarray | ImageError | None]:
    """Yields the pixels of every image in turn, None where there is none.

    An image that follows itself within `ahead` is decoded once.

    Args:
      images: names and sources.
      size, mode, mean: see `images.preprocess`.
      num_workers: processes; 0 decodes in this one. Started afresh, not forked: the parent may
        hold an accelerator. A script must therefore guard its main part by `__name__`.
      ahead: how many images may be under way before they are asked for.
    """
    if num_workers == 0:
        for named in images:
            yield None if named is None else load_pixels(named, size, mode, mean)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        queue: collections.deque[tuple[str, concurrent.futures.Future] | None] = collections.deque()
        recent: dict[str, concurrent.futures.Future] = {}
        iterator = iter(images)

        def submit(count: int) -> None:
            for named in itertools.islice(iterator, count):
                if named is None:
                    queue.append(None)
                    continue
                name = named[0]
                if name not in recent:
                    recent[name] = pool.submit(load_pixels, named, size, mode, mean)
                queue.append((name, recent[name]))

        submit(ahead)
        while queue:
            entry = queue.popleft()
            submit(1)
            if entry is None:
                yield None
                continue
            name, future = entry
            if not any(waiting and waiting[0] == name for waiting in queue):
                recent.pop(name, None)
            try:
                yield future.result(TIMEOUT_SECONDS)
            except TimeoutError:
                yield ImageError(f"{name}: not decoded within {TIMEOUT_SECONDS} seconds")

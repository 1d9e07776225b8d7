"""Which patches an engine's reduction keeps of images."""

import collections
from collections.abc import Sequence

import numpy as np

from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Request


def kept_patches(engine: Engine, requests: Sequence[Request]) -> list[tuple[int, np.ndarray]]:
    """Visual tokens of the one image of each request, and the patches among them."""
    kept, waiting = [], collections.deque(requests)
    while waiting:
        places = engine.encoder.places(engine.reduction)
        while waiting and places.add(waiting[0]):
            waiting.popleft()
        images = engine.encoder.measure(engine.encoder.encode(places, engine.reduction))
        for ((number,),) in places.numbers:
            batch, row = divmod(number, len(images.lengths))
            length = int(images.lengths[row, batch])
            patches = images.patch_indices[row, batch, :length]
            kept.append((length, patches[patches >= 0]))
    return kept

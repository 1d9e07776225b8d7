"""The batch engine: many (image, text) requests through few jitted functions of fixed shape.

A window of requests goes through four stages:

1. encode: images, in batches of one shape, to visual tokens of per-image length (`encoding.py`).
2. plan: the lengths come to the host, which packs all sequences into rows (`windows.py`).
3. prefill: rows of one shape through the decoder.
4. read off log-likelihoods (`scoring.py`); or decode the sequences in slots (`decoding.py`).

Work is dispatched ahead: while the host plans one window, the device already encodes the next, and
results are fetched only after the work that follows them has been queued.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.decoding import SlotDecoder
from prumerge_jax.engine.encoding import Encoder, PlacedModel
from prumerge_jax.engine.request import Answer, Delta, ImageInput, Request, SamplingParams
from prumerge_jax.engine.scoring import Scores, dispatch_scores
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.engine.windows import Counters, Window, WindowPlanner
from prumerge_jax.reductions import Reduction

_Event = TypeVar("_Event", bound=Delta | Answer)


class Engine:
    """Runs requests on one model with one reduction.

    Attributes:
      counters: what has been computed so far.
    """

    def __init__(
        self,
        model: PlacedModel,
        reduction: Reduction,
        shapes: EngineShapes,
        *,
        position_ids: packing.PositionIds = "compact",
    ) -> None:
        """Prepares an engine; nothing is compiled yet.

        Args:
          model: the model; its mesh must be the current one when requests run.
          reduction: what happens to the visual tokens.
          shapes: shapes of the jitted functions.
          position_ids: see `packing.pack_window`.

        Raises:
          ValueError: a shape does not divide over the data shards of the mesh, or other position
            ids.
        """
        shapes.check_shards(model.shards)
        packing.check_position_ids(position_ids)
        self.model, self.reduction, self.shapes = model, reduction, shapes
        self.position_ids = position_ids
        self.encoder = Encoder(model, shapes)
        self.counters = Counters()

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Generates an answer to every request. Answers come in any order."""
        for event in self.stream(requests):
            if isinstance(event, Answer):
                yield event

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta | Answer]:
        """`generate` with every request's tokens as they come, before its answer."""
        decoder = SlotDecoder(self.model, self.shapes, key_bias=self.reduction.weighs_tokens)
        for window in self._windows(requests):
            yield from self._counted(window.failed)
            for rows in window.batches:
                yield from self._counted(decoder.run(window, rows))
        yield from self._counted(decoder.drain())

    def score(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The log-likelihood of every request's continuation. Answers come in any order."""
        unread: collections.deque[Scores] = collections.deque()
        longest_prompt = self.shapes.longest_prompt
        for window in self._windows(requests):
            yield from window.failed
            for rows in window.batches:
                scores = dispatch_scores(self.model, window, rows, longest_prompt=longest_prompt)
                unread.append(scores)
                if len(unread) > 1:
                    yield from self._counted(unread.popleft().answers())
        for scores in unread:
            yield from self._counted(scores.answers())

    def warm_up(self) -> None:
        """Compiles all jitted functions of `generate` by running a meaningless request.

        A second one, where images may need more tokens than the capacity, runs with room for all.
        """
        side = self.model.config.vision.image_size
        image = ImageInput(np.zeros((1, side, side, 3), np.uint8))
        token_ids = np.array([0, IMAGE_TOKEN], np.int32)
        sampling = SamplingParams(max_new_tokens=2, stop_ids=())
        request = Request(0, token_ids, (image,), sampling=sampling, question_ids=token_ids[:1])
        patches = self.model.config.vision.num_patches
        for reduction in dict.fromkeys((self.reduction, self.reduction.uncapped())):
            if reduction.capacity_for(patches) >= self.reduction.capacity_for(patches):
                same = Engine(self.model, reduction, self.shapes, position_ids=self.position_ids)
                collections.deque(same.generate([request]), maxlen=0)

    def _windows(self, requests: Iterable[Request]) -> Iterator[Window]:
        planner = WindowPlanner(self.encoder, self.reduction, self.position_ids, self.counters)
        return planner.windows(requests)

    def _counted(self, events: Iterable[_Event]) -> Iterator[_Event]:
        for event in events:
            self.counters.requests += isinstance(event, Answer) and event.error is None
            yield event

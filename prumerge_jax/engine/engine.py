"""The batch engine: many (image, text) requests through few jitted functions of fixed shape.

Requests are submitted, and every step returns what has come of those under way (`core.py`). A
window of them goes through four stages:

1. encode: images, in batches of one shape, to visual tokens of per-image length (`encoding.py`).
2. plan: the lengths come to the host, which packs all sequences into rows (`windows.py`).
3. prefill: rows of one shape through the decoder, keys and values into pages (`pages.py`).
4. read off log-likelihoods (`scoring.py`); or decode the sequences in slots (`decoding.py`).

Work is dispatched ahead: while the host plans one window, the device already encodes the next, and
results are fetched only after the work that follows them has been queued.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from prumerge_jax.data.images import Video
from prumerge_jax.data.pictures import PictureProcessor, default_mode
from prumerge_jax.data.sequences import PositionIds, check_position_ids
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.data.visual_layout import Newlines, check_newlines
from prumerge_jax.engine.core import Core
from prumerge_jax.engine.encoding import Encoder, PlacedModel
from prumerge_jax.engine.probing import SequenceAttention, sequence_attention
from prumerge_jax.engine.request import (
    Answer,
    Delta,
    ImageInput,
    Request,
    SamplingParams,
    SequenceLogits,
)
from prumerge_jax.engine.scoring import sequence_logits
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.engine.windows import Counters, Window, WindowPlanner
from prumerge_jax.reductions import Drops, Reduction, spell


class Engine:
    """Runs requests on one model with one reduction.

    A server calls `submit`, `step` and `cancel`; `generate`, `stream` and `score` do so for many
    requests at once.

    Attributes:
      counters: what has been computed so far.
      core: the requests under way.
    """

    def __init__(
        self,
        model: PlacedModel,
        reduction: Reduction,
        shapes: EngineShapes,
        *,
        position_ids: PositionIds = "compact",
        newlines: Newlines = "none",
        image_budget: int | None = None,
    ) -> None:
        """Prepares an engine; nothing is compiled yet.

        Args:
          model: the model; its mesh must be the current one when requests run.
          reduction: what happens to the visual tokens.
          shapes: shapes of the jitted functions.
          position_ids: see `packing.pack_window`.
          newlines: see `visual_layout.Newlines`.
          image_budget: most patches that the crops of an image keep together, see
            `visual_layout.run_of_image`; None for no limit.

        Raises:
          ValueError: a shape does not divide over the data shards of the mesh, other position ids,
            newlines that do not exist or the model does not have, a budget for tokens that are
            not in the order of their attention, or shared prefixes with a reduction that drops
            tokens by what is asked.
        """
        shapes.check_shards(model.shards)
        check_position_ids(position_ids)
        check_newlines(newlines)
        if newlines != "none" and not model.config.image_newline:
            raise ValueError(f"newlines is {newlines!r}, the model has none; expected 'none'")
        self.model, self.reduction, self.shapes = model, reduction, shapes
        if image_budget is not None and (image_budget < 1 or reduction.raster_order):
            raise ValueError(
                f"image_budget is {image_budget} with the reduction {spell(reduction)}; expected "
                "at least 1, and a reduction whose tokens are in the order of their attention"
            )
        self.position_ids, self.newlines = position_ids, newlines
        self.image_budget = image_budget
        self.encoder = Encoder(model, shapes)
        self.counters = Counters()
        self._drops = _drops_of(reduction, model, position_ids)
        if self._drops is not None and shapes.share_prefixes:
            raise ValueError(
                f"the reduction {spell(reduction)} drops tokens by what is asked; questions cannot "
                "share any: expected share_prefixes=False"
            )
        self.core = Core(
            model,
            shapes,
            {None: lambda: self.planner(self.counters)},
            self.counters,
            key_bias=reduction.weighs_tokens,
            drops=self._drops,
        )

    def submit(self, request: Request) -> None:
        """Takes a request: to score if it has a continuation, else to generate from.

        Raises:
          ValueError: a request of the same key is being answered.
        """
        self.core.submit(request)

    def step(self) -> list[Delta | Answer]:
        """Dispatches more work, and returns what has come of earlier one: new tokens of answers
        that are being generated, and answers. Empty where there is nothing new.

        Work of two steps overlaps, so an answer is returned by the step after the one that
        dispatched the last of it.
        """
        return self.core.step()

    def cancel(self, key: int) -> None:
        """Ends a request. Its slot and pages are free at once; its answer, with the tokens so far
        and `cancelled` as the reason, is among those of the next step.

        Raises:
          ValueError: no request of this key is being answered.
        """
        self.core.cancel(key)

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Generates an answer to every request. Answers come in any order."""
        for event in self.stream(requests):
            if isinstance(event, Answer):
                yield event

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta | Answer]:
        """`generate` with every request's tokens as they come, before its answer.

        Raises:
          ValueError: a request has a continuation, or another run on this engine is not finished.
        """
        return self._run(requests, to_score=False)

    def score(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The log-likelihood of every request's continuation. Answers come in any order.

        Raises:
          ValueError: a request has no continuation, or another run on this engine is not finished.
        """
        for event in self._run(requests, to_score=True):
            if isinstance(event, Answer):
                yield event

    def logits(self, requests: Iterable[Request]) -> Iterator[SequenceLogits | Answer]:
        """The logits of every request's sequence, in any order; an answer where it cannot run."""
        longest = self.shapes.longest_prompt
        for window in self._windows(requests):
            yield from window.failed
            for rows in window.batches:
                yield from sequence_logits(
                    self.model, window, rows, longest_prompt=longest, drops=self._drops
                )

    def attention(self, requests: Iterable[Request]) -> Iterator[SequenceAttention | Answer]:
        """What the last token of every prompt attends to; an answer where it cannot run.

        Raises:
          ValueError: the engine shares prefixes, or tokens leave its decoder.
        """
        if self.shapes.share_prefixes or self._drops is not None:
            raise ValueError(
                f"attention with the reduction {spell(self.reduction)} and share_prefixes="
                f"{self.shapes.share_prefixes}; expected share_prefixes=False, and tokens that stay"
            )
        for window in self._windows(requests):
            yield from window.failed
            for rows in window.batches:
                yield from sequence_attention(self.model, window, rows)

    def warm_up(self, *, videos: bool = False, rows: bool = True) -> None:
        """Compiles all jitted functions of `generate` by running meaningless requests: one alone,
        and where prefixes are shared two that begin alike, in rows of every length.

        Where images may need more tokens than the capacity, they run again with room for all.

        Args:
          videos: whether requests about videos come too.
          rows: whether what does not see the reduction is compiled too: rows of every length and
            form. Without, another engine of equal shapes must have done it.
        """
        vision = self.model.config.vision
        pixels = np.zeros((1, vision.image_size, vision.image_size, 3), np.uint8)
        image = ImageInput(pixels, key="warm-up")
        token_ids = np.array([0, IMAGE_TOKEN], np.int32)
        sampling = SamplingParams(max_new_tokens=2, stop_ids=())
        asked = Request(0, token_ids, (image,), sampling=sampling, question_ids=token_ids[:1])
        patches = vision.num_patches
        for reduction in dict.fromkeys((self.reduction, self.reduction.uncapped())):
            if reduction.capacity_for(patches) >= self.reduction.capacity_for(patches):
                self._run_alone(reduction, asked, self.shapes.row_length, both=rows)
                if videos:
                    shown = dataclasses.replace(asked, images=(self._meaningless_video(),))
                    self._run_alone(reduction, shown, self.shapes.row_length, both=rows)
        text = Request(0, np.zeros(2, np.int32), sampling=sampling)
        for length in self.shapes.row_lengths[:-1] if rows else ():
            self._run_alone(self.reduction, text, length, both=True)

    def _meaningless_video(self) -> ImageInput:
        config = self.model.config
        side = config.vision.image_size
        processor = PictureProcessor(config, side, default_mode(config))
        frame = np.zeros((side, side, 3), np.uint8)
        return ImageInput(*processor(Video([frame])), key="warm-up video")

    def _run_alone(
        self, reduction: Reduction, request: Request, row_length: int, *, both: bool
    ) -> None:
        """Runs a request in an engine of its own, then `both` forms: two that share a prefix, where
        any do."""
        shapes = dataclasses.replace(self.shapes, row_length=row_length, short_rows=())
        same = Engine(self.model, reduction, shapes, position_ids=self.position_ids)
        for count in (1, 2) if both and shapes.share_prefixes else (1,):
            some = [dataclasses.replace(request, key=key) for key in range(count)]
            collections.deque(same.generate(some), maxlen=0)

    def planner(self, counters: Counters) -> WindowPlanner:
        """Plans windows of this engine's requests."""
        return WindowPlanner(
            self.encoder,
            self.reduction,
            self.position_ids,
            counters,
            self.newlines,
            self.image_budget,
        )

    def _windows(self, requests: Iterable[Request]) -> Iterator[Window]:
        """The requests in windows, encoded and packed."""
        source, size = iter(requests), self.shapes.window_size
        batches = iter(lambda: list(itertools.islice(source, size)), [])
        return self.planner(self.counters).windows(batches)

    def _run(self, requests: Iterable[Request], *, to_score: bool) -> Iterator[Delta | Answer]:
        """Drives the core until every request has been answered."""
        core, source = self.core, iter(requests)
        if core.is_busy:
            raise ValueError("the engine is busy with other requests; let their run end first")
        request = next(source, None)
        try:
            while request is not None or core.is_busy:
                while request is not None and core.has_room:
                    if to_score != bool(len(request.continuation)):
                        expected = "a continuation to score" if to_score else "no continuation"
                        raise ValueError(f"request {request.key}: expected {expected}")
                    core.submit(request)
                    request = next(source, None)
                yield from core.step()
        finally:
            core.reset()


def _drops_of(reduction: Reduction, model: PlacedModel, position_ids: PositionIds) -> Drops | None:
    """What leaves the decoder; with original positions no token gets another one."""
    drops = reduction.drops(model.config.text.num_layers)
    if drops is None or position_ids == "compact":
        return drops
    return drops._replace(renumbered=False)

"""What the server needs of a model: prompts, limits, processors, engines."""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.data.pictures import PictureMode, PictureProcessor
from prumerge_jax.data.templates import chat_parts
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN
from prumerge_jax.engine.build import Draft, question_ids
from prumerge_jax.engine.shared import SharedEngine
from prumerge_jax.llava import Explanation, Llava
from prumerge_jax.reductions import Reduction
from prumerge_jax.serve import engines
from prumerge_jax.serve.chat import Chat
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.pictures import Pictures
from prumerge_jax.serve.scheduler import Scheduler


class ServedModel:
    """A model under the name and the limits of a configuration.

    Attributes:
      name: what clients ask for.
      reductions: what they may choose, by spelling; the first one is the default.
      lanes: the same, by the engine that runs them.
    """

    def __init__(self, llava: Llava, config: ServeConfig) -> None:
        self.llava, self.config = llava, config
        self.tokenizer = llava.tokenizer
        self.pictures = Pictures(llava, config.max_images, config.max_image_pixels)
        self.name = config.served_model_name or pathlib.Path(config.checkpoint).name
        self.reductions: Mapping[str, Reduction] = {
            spelling: reductions.parse(spelling) for spelling in config.reductions
        }
        for reduction in self.reductions.values():
            self.pictures.largest(reduction)  # a tower that cannot provide it is told now
        self.lanes = engines.lanes(self.reductions)
        self._running: dict[str, SharedEngine] = {}
        self._template = llava.template(config.conversation)

    @property
    def max_prompt_tokens(self) -> int:
        """Most text tokens of a prompt."""
        return min(self.config.max_prompt_tokens, self.llava.config.text.max_positions - 1)

    def reduction(self, model: str, asked: str | None) -> str:
        """The allowed reduction that a request means, by `NAME@REDUCTION` or by its field.

        Raises:
          ApiError: 404 another model, 400 a reduction that is not allowed.
        """
        name, at, named = model.partition("@")
        if name != self.name:
            raise ApiError(
                404,
                f"model {model!r} is not served; expected {self.name!r}, or {self.name}@REDUCTION",
                param="model",
                code="model_not_found",
            )
        if at and asked is not None and asked != named:
            raise ApiError(
                400,
                f"reduction {asked!r} contradicts the model's name {model!r}; give one of them",
                param="reduction",
                code="invalid_value",
            )
        spelling = named if at else asked
        if spelling is None:
            return next(iter(self.reductions))
        return self._allowed(spelling, "model" if at else "reduction")

    def _allowed(self, spelling: str, param: str) -> str:
        if spelling in self.reductions:
            return spelling
        try:
            meant = reductions.parse(spelling)
        except ValueError:
            meant = None
        for allowed, reduction in self.reductions.items():
            if meant == reduction:
                return allowed
        raise ApiError(
            400,
            f"reduction {spelling!r} is not served; expected one of {' '.join(self.reductions)}",
            param=param,
            code="reduction_not_allowed",
        )

    def processor(self, reduction: str, mode: PictureMode | None) -> PictureProcessor:
        """Makes an image's crops for a reduction; None is the model's own mode.

        Raises:
          ApiError: 400 a mode that model or reduction do not support.
        """
        try:
            chosen = self.reductions[reduction]
            return self.pictures.processor(chosen, mode or self.pictures.mode)
        except ValueError as error:
            raise ApiError(400, str(error), param="image_mode", code="invalid_value") from error

    def prompt_ids(self, chat: Chat) -> np.ndarray:
        """Token ids int32 [T] of a conversation's prompt.

        Raises:
          ApiError: 400 a text that cannot be asked, or too many tokens.
        """
        try:
            visuals = [IMAGE_PLACEHOLDER] * len(chat.images)
            parts = chat_parts(self._template, chat.turns, visuals, chat.system)
            ids = np.array(self.tokenizer.encode_prompt(parts), np.int32)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        count = len(ids) - len(chat.images)
        if count > self.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {count} text tokens, of at most {self.max_prompt_tokens}; "
                "shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        return ids

    def question_ids(self, chat: Chat) -> np.ndarray:
        """Ids int32 [M] of the keywords of the last question, for reductions that read them."""
        return question_ids(self.tokenizer, chat.turns[-1])

    def max_new_tokens(
        self, asked: int | None, text_tokens: int, visual_tokens: int, param: str
    ) -> int:
        """The most tokens of an answer: those asked for, or what fits in any case.

        Args:
          asked: by the request, in the field `param`; None where it did not.
          text_tokens: of the prompt.
          visual_tokens: the most that the images can have.
          param: the field.

        Raises:
          ApiError: 400 more are asked for than the server or the model allows.
        """
        positions = self.llava.config.text.max_positions
        room = min(self.config.max_new_tokens, positions - text_tokens)
        if asked is None:
            return max(1, min(room, positions - text_tokens - visual_tokens))
        if asked > room:
            raise ApiError(
                400,
                f"{param} is {asked}; at most {room} fit after {text_tokens} text tokens",
                param=param,
                code="invalid_value",
            )
        return asked

    def scheduler(self) -> Scheduler:
        """What runs requests; nothing is prepared yet."""
        makers = {name: functools.partial(self.engine, name) for name in self.lanes}
        capacity = 2 * self.llava.engine_sizes.slots  # the next ones are prefilled in the meantime
        return Scheduler(makers, capacity, placed=self.llava.placed, prepare=self.prepare)

    def lane_of(self, reduction: str) -> str:
        """The engine that runs requests of a reduction."""
        return engines.lane_of(self.reductions[reduction])

    def engine(self, lane: str) -> SharedEngine:
        """A new engine, everything compiled."""
        engine = engines.shared_engine(
            self.llava, self.lanes[lane], self.config, self._longest, self.pictures.most_crops
        )
        self._running[lane] = engine
        return engine

    def _longest(self, reduction: Reduction) -> list[Draft]:
        """For every slot the longest request that is admitted; they have nothing in common."""
        layouts = self.pictures.largest(reduction)
        drafts = []
        for number in range(self.llava.engine_sizes.slots):
            ids = np.full(self.max_prompt_tokens + len(layouts), number, np.int32)
            ids[: len(layouts)] = IMAGE_TOKEN
            named = tuple((f"{number} {image}", b"") for image in range(len(layouts)))
            drafts.append(Draft(number, ids, named, layouts=layouts))
        return drafts

    def pages_used(self) -> int:
        """Pages of keys and values that sequences hold, in all engines."""
        decoders = [engine.core.decoder for engine in self._running.values()]
        return sum(decoder.taken_pages for decoder in decoders if decoder is not None)

    def row_fill(self) -> float:
        """Share of the tokens of packed rows that are no padding; 1 before there were any."""
        counters = [engine.counters for engine in self._running.values()]
        rows = sum(each.row_tokens for each in counters)
        return sum(each.real_tokens for each in counters) / rows if rows else 1.0

    def explain(self, pixels: np.ndarray, reduction: str, question: str | None) -> Explanation:
        """What a reduction keeps of an image; to be called on the scheduler's thread.

        Raises:
          ValueError: the reduction reads the question, and there is none.
        """
        return self.llava.explain(pixels, reduction=self.reductions[reduction], question=question)

    def prepare(self) -> None:
        """Compiles what `explain` runs."""
        for name, reduction in self.reductions.items():
            side = self.llava.image_size(reduction)
            self.explain(np.zeros((side, side, 3), np.uint8), name, "word")

"""What the server needs of a model: prompts, limits, processors, engines."""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.data.images import ImageMode, ImageProcessor
from prumerge_jax.data.pictures import default_mode
from prumerge_jax.data.templates import chat_parts
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN
from prumerge_jax.engine.build import Draft, question_ids
from prumerge_jax.engine.engine import Engine
from prumerge_jax.llava import Explanation, Llava
from prumerge_jax.reductions import Reduction
from prumerge_jax.serve.chat import Chat
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.scheduler import Core, Scheduler


class ServedModel:
    """A model under the name and the limits of a configuration.

    Attributes:
      name: what clients ask for.
      reductions: what they may choose, by spelling; the first one is the default.
    """

    def __init__(self, llava: Llava, config: ServeConfig) -> None:
        self.llava, self.config = llava, config
        self.tokenizer = llava.tokenizer
        if default_mode(llava.config) != "pad":
            raise ValueError(
                f"--checkpoint {config.checkpoint}: the model cuts images into tiles; the server "
                "takes models that see an image as one square, such as LLaVA-1.5"
            )
        self.name = config.served_model_name or pathlib.Path(config.checkpoint).name
        self.reductions: Mapping[str, Reduction] = {
            spelling: reductions.parse(spelling) for spelling in config.reductions
        }
        for reduction in self.reductions.values():
            llava.image_size(reduction)  # a tower that cannot provide it is told now
        self._engines: dict[str, Engine] = {}
        self._template = llava.template(config.conversation)

    @property
    def num_patches(self) -> int:
        """Visual tokens of an image that nothing reduces."""
        return self.llava.config.vision.num_patches

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

    def processor(self, reduction: str, mode: ImageMode) -> ImageProcessor:
        """Makes an image's pixels for a reduction."""
        return ImageProcessor(
            self.llava.image_size(self.reductions[reduction]),
            self.llava.config.vision.pixel_mean,
            mode,
            max_pixels=self.config.max_image_pixels,
        )

    def prompt_ids(self, chat: Chat) -> np.ndarray:
        """Token ids int32 [T] of a conversation's prompt.

        Raises:
          ApiError: 400 a text that cannot be asked, or too many tokens.
        """
        try:
            visuals = [] if chat.image is None else [IMAGE_PLACEHOLDER]
            parts = chat_parts(self._template, chat.turns, visuals, chat.system)
            ids = np.array(self.tokenizer.encode_prompt(parts), np.int32)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        count = len(ids) - (chat.image is not None)
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

    def max_new_tokens(self, asked: int | None, text_tokens: int, param: str) -> int:
        """The most tokens of an answer: those asked for, or what fits in any case.

        Raises:
          ApiError: 400 more are asked for than the server or the model allows.
        """
        positions = self.llava.config.text.max_positions
        room = min(self.config.max_new_tokens, positions - text_tokens)
        if asked is None:
            return max(1, min(room, positions - text_tokens - self.num_patches))
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
        engines = {name: functools.partial(self._engine, name) for name in self.reductions}
        capacity = 2 * self.llava.engine_sizes.slots  # the next ones are prefilled in the meantime
        return Scheduler(engines, capacity, placed=self.llava.placed, prepare=self.prepare)

    def _engine(self, name: str) -> Core:
        """The engine of a reduction, everything compiled."""
        slots = self.llava.engine_sizes.slots
        engine = self.llava.engine(
            self.reductions[name],
            [self._longest(number) for number in range(slots)],
            max_new_tokens=self.config.max_new_tokens,
            position_ids=self.config.position_ids,
        )
        engine.warm_up()
        self._engines[name] = engine
        return engine

    def _longest(self, number: int) -> Draft:
        """The longest request that is admitted; two of them have nothing in common."""
        ids = np.full(self.max_prompt_tokens + 1, number, np.int32)
        ids[0] = IMAGE_TOKEN
        return Draft(number, ids, ((str(number), b""),))

    def pages_used(self) -> int:
        """Pages of keys and values that sequences hold, in all engines."""
        decoders = [engine.core.decoder for engine in self._engines.values()]
        return sum(decoder.taken_pages for decoder in decoders if decoder is not None)

    def row_fill(self) -> float:
        """Share of the tokens of packed rows that are no padding; 1 before there were any."""
        counters = [engine.counters for engine in self._engines.values()]
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

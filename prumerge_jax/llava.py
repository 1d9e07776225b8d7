"""`Llava`: a converted model with its tokenizer, ready to answer and to score."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prumerge_jax import sharding
from prumerge_jax.conversion import download as downloads
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.images import ImageMode, ImageSource, Shown
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.data.pictures import PictureMode, PictureProcessor, default_mode, only_crop
from prumerge_jax.data.templates import TEMPLATES, Template, chat_template
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.visual_layout import Newlines
from prumerge_jax.engine.answers import in_order, text_pieces
from prumerge_jax.engine.build import (
    Draft,
    Images,
    RequestBuilder,
    asked_ids,
    check_list,
    continued,
    drafts_of_ids,
    named_image,
    requests_of,
)
from prumerge_jax.engine.embeddings import embed
from prumerge_jax.engine.encoding import PlacedModel, compute_dtype, data_shards
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.explanations import Explanation, explain_crops
from prumerge_jax.engine.fitted import fitted_engine
from prumerge_jax.engine.loading import check_vocabulary, load_model
from prumerge_jax.engine.request import Answer, SamplingParams
from prumerge_jax.engine.shapes import EngineConfig, EngineSizes
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import format_named, named_cache_dtype
from prumerge_jax.reductions import ReductionLike, as_reduction


class Llava:
    """A LLaVA on the current devices.

    Attributes:
      tokenizer: its tokenizer.
      engine_config: fixed shapes of the jitted functions.
    """

    def __init__(
        self, model: PlacedModel, tokenizer: Tokenizer, *, engine: EngineConfig | None = None
    ) -> None:
        """Wraps weights that are on their devices already; see `load`.

        Raises:
          ValueError: tokenizer and model do not belong together, or a size of the engine does not
            divide over the model's mesh.
        """
        check_vocabulary(tokenizer, model.config)
        self._model, self.tokenizer = model, tokenizer
        self.engine_config = engine or EngineConfig()
        self.engine_config.sizes(model.shards)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: jnp.dtype | str | None = None,
        engine: EngineConfig | None = None,
        mesh: Mesh | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        cache_dtype: str | None = None,
    ) -> "Llava":
        """Loads a directory that `convert_weights.py` or `train.py` wrote.

        Args:
          directory: the converted directory, or `miniature` for the model that comes with the
            package; every file is checked against its manifest.
          dtype: dtype of the weights on the device and of the computation, `float32`, `bfloat16`
            or `float16`; by default as stored.
          engine: shapes of the jitted functions to fix.
          mesh: devices to place the weights on (`sharding.make_mesh`); by default the first one.
            Each weight is read straight into its shards.
          revision: a commit of the Hugging Face repository that `directory` then names; without
            it nothing is downloaded.
          quantize: format of the kernels of the decoder's layers, `int8`, `int8x8`, `int4` or
            `nf4`; by default that of the directory. Kernels are quantised one by one as they are
            read.
          cache_dtype: `int8` keeps keys and values in 8 bits, with a scale per token and head; by
            default they have the dtype of computation.

        Raises:
          ConversionError: the revision is no commit, or cannot be downloaded.
          DirectoryError: the directory is incomplete or altered; the message names the file.
          ValueError: another dtype or format, a format that the directory's weights cannot be
            brought into, or a size of the engine that does not divide over the mesh.
        """
        if quantize is not None:
            format_named(quantize)
        cache = named_cache_dtype(cache_dtype)
        chosen = None if dtype is None else compute_dtype(dtype)
        (engine or EngineConfig()).sizes(data_shards(mesh))
        if revision is not None:
            repository = downloads.check_commit(os.fspath(directory), revision)
            directory = downloads.snapshot(repository, revision, None)
        root = model_directory(directory)
        model, tokenizer = load_model(
            root, dtype=chosen, mesh=mesh, quantize=quantize, cache_dtype=cache
        )
        return cls(model, tokenizer, engine=engine)

    @property
    def config(self) -> LlavaConfig:
        """Sizes of the model."""
        return self._model.config

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return self._model.dtype

    @property
    def engine_sizes(self) -> EngineSizes:
        """How much one call of each jitted function takes, before it is fitted to requests."""
        return self.engine_config.sizes(self._model.shards)

    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        reduction: ReductionLike = "prumerge",
        max_new_tokens: int = 64,
        image_mode: PictureMode | None = None,
        conversation: str | None = None,
        position_ids: PositionIds = "compact",
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers a batch of questions about images.

        Args:
          images: one per prompt: a path, bytes, PIL image, uint8 [H, W, 3], data URL or None; a
            tuple of them where the model takes several.
          prompts: the user's text alone.
          reduction: its spelling, as `prumerge:neighbours=8`; see `reductions.parse`.
          max_new_tokens: most tokens per answer.
          image_mode: `pad` to a square, `crop` the central one, or `anyres` for tiles; by default
            what the model was trained with.
          conversation: name of a template, see `data.templates.TEMPLATES`; None is the model's.
          position_ids: `compact` (the reference) or `original`, see `packing.pack_window`.
          temperature: 0 is greedy.
          top_p: smallest probability mass to draw from.
          seed: prompt i draws with seed + i (modulo 2**32), whatever its batch mates.

        Returns:
          One answer per prompt, in order.

        Raises:
          ImageError: an image cannot be used; the message names it.
          ValueError: a prompt cannot run (the message says which and why), an unknown name, a value
            out of its bounds, or no lists of prompts and images.
        """
        sampling = SamplingParams(temperature, top_p, max_new_tokens, seed=seed)
        builder = self._builder(image_mode, conversation, reduction)
        drafts = builder.drafts(images, prompts, sampling)
        engine = self.engine(
            reduction, drafts, max_new_tokens=max_new_tokens, position_ids=position_ids
        )
        with self.placed():
            answers = in_order(engine.generate(builder.requests(drafts)), range(len(drafts)))
        return [self.tokenizer.decode(answer.token_ids) for answer in answers]

    def stream(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        reduction: ReductionLike = "prumerge",
        max_new_tokens: int = 64,
        image_mode: PictureMode | None = None,
        conversation: str | None = None,
        position_ids: PositionIds = "compact",
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """The answers of `generate`, piece by piece as they come.

        Arguments and errors as in `generate`. How often pieces come is `decode_steps_per_call` of
        the engine's configuration.

        Returns:
          Pairs of a prompt's index and the next piece of its answer, those of several prompts
          interleaved. The pieces of one prompt joined are what `generate` returns.
        """
        sampling = SamplingParams(temperature, top_p, max_new_tokens, seed=seed)
        builder = self._builder(image_mode, conversation, reduction)
        drafts = builder.drafts(images, prompts, sampling)
        engine = self.engine(
            reduction, drafts, max_new_tokens=max_new_tokens, position_ids=position_ids
        )
        events = engine.stream(builder.requests(drafts))
        return text_pieces(events, len(drafts), self.tokenizer, self._model.mesh)

    @overload
    def score(
        self,
        images: Images,
        prompts: Sequence[str],
        continuations: Sequence[str],
        *,
        reduction: ReductionLike = ...,
        image_mode: PictureMode | None = ...,
        conversation: str | None = ...,
        position_ids: PositionIds = ...,
    ) -> list[float]: ...

    @overload
    def score(
        self,
        images: Images,
        prompts: Sequence[str],
        continuations: Sequence[list[str]] | Sequence[tuple[str, ...]],
        *,
        reduction: ReductionLike = ...,
        image_mode: PictureMode | None = ...,
        conversation: str | None = ...,
        position_ids: PositionIds = ...,
    ) -> list[list[float]]: ...

    def score(
        self,
        images: Images,
        prompts: Sequence[str],
        continuations: Sequence[str] | Sequence[list[str]] | Sequence[tuple[str, ...]],
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: PictureMode | None = None,
        conversation: str | None = None,
        position_ids: PositionIds = "compact",
    ) -> list[float] | list[list[float]]:
        """The log-likelihood of each continuation as the answer to its prompt.

        Arguments and errors as in `generate`.

        Args:
          continuations: the answers' text, one per prompt or a list of several; it follows the
            prompt as in training, after a space.

        Returns:
          Natural logarithms, summed over the continuation's tokens, in order; lists of them where
          the continuations are lists.
        """
        builder = self._builder(image_mode, conversation, reduction)
        asked = builder.drafts(images, prompts)
        check_list(continuations, "continuations")
        if len(continuations) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations")
        several = [list(c) if isinstance(c, list | tuple) else [c] for c in continuations]
        drafts, prompt_of = continued(asked, several, self.tokenizer)
        engine = self.engine(reduction, drafts, position_ids=position_ids)
        with self.placed():
            answers = iter(in_order(engine.score(builder.requests(drafts)), prompt_of))
        scores = [[next(answers).log_likelihood for _ in texts] for texts in several]
        if all(isinstance(each, str) for each in continuations):
            return [score for (score,) in scores]
        return scores

    def logits(
        self,
        images: Images,
        token_ids: Sequence[Sequence[int] | np.ndarray],
        *,
        reduction: ReductionLike = "full",
        image_mode: PictureMode | None = None,
        position_ids: PositionIds = "compact",
    ) -> list[np.ndarray]:
        """Next-token logits at every position of prompts that are given as ids.

        Arguments and errors as in `generate`. Neither tokenizer nor chat template is read.

        Args:
          token_ids: ids of every prompt, -200 where an image goes.

        Returns:
          float32 [T, V] for each prompt; T counts the visual tokens in place of each -200, and the
          newlines among them.
        """
        processor = self.processor(image_mode, reduction)
        drafts = drafts_of_ids(images, token_ids, processor)
        engine = self.engine(reduction, drafts, max_new_tokens=1, position_ids=position_ids)
        found: dict[int, np.ndarray] = {}
        with self.placed():
            for result in engine.logits(requests_of(drafts, processor)):
                if isinstance(result, Answer):
                    raise ValueError(f"prompt {result.key}: {result.error}")
                found[result.key] = result.values
        return [found[key] for key in range(len(drafts))]

    def explain(
        self,
        image: ImageSource,
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: PictureMode | None = None,
        question: str | None = None,
    ) -> Explanation:
        """Which patches of an image are kept and where the others go; `overlay` draws it.

        Args:
          image, reduction: as in `generate`.
          image_mode: one that makes one crop of an image; None is `pad`.
          question: the user's text, for reductions that read it.

        Raises:
          ImageError: the image cannot be used.
          ValueError: the reduction reads the question and there is none, or an argument is wrong.
        """
        mode = "pad" if image_mode is None else image_mode
        explained = self.explain_crops(
            image, reduction=reduction, image_mode=mode, question=question
        )
        if len(explained) > 1:
            raise ValueError(
                f"the image has {len(explained)} crops; expected mode 'pad' or 'crop', or "
                "explain_crops"
            )
        return explained[0]

    def explain_crops(
        self,
        image: Shown,
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: PictureMode | None = None,
        question: str | None = None,
    ) -> list[Explanation]:
        """`explain` of every crop of an image in the model's own mode, or every frame of a video.

        A patch that is merged into an earlier frame's goes nowhere. Arguments and errors as in
        `explain`.
        """
        reduction = as_reduction(reduction)
        asked = asked_ids(self.tokenizer, question, reduction)
        name, source = named_image(image, "image")
        picture = self.processor(image_mode, reduction)(source, name)
        with self.placed():
            return explain_crops(self._model, picture, reduction, asked)

    def embed(
        self,
        images: Sequence[ImageSource],
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: ImageMode = "pad",
    ) -> Iterator[np.ndarray]:
        """What the decoder receives of each image, float32 [n, width]; n differs by image.

        Raises:
          ImageError: an image cannot be used.
          ValueError: the reduction reads the question.
        """
        processor = self.processor(image_mode, reduction)
        named = [named_image(image, f"image {number}") for number, image in enumerate(images)]
        pixels = (only_crop(processor(source, name), name) for name, source in named)
        with self.placed():
            yield from embed(self._model, pixels, as_reduction(reduction))

    def engine(
        self,
        reduction: ReductionLike,
        drafts: Sequence[Draft],
        *,
        max_new_tokens: int = 0,
        position_ids: PositionIds = "compact",
        newlines: Newlines = "none",
        image_budget: int | None = None,
    ) -> Engine:
        """An engine for this model, its shapes fitted to the requests that will run.

        Args:
          reduction, position_ids: as in `generate`.
          drafts: the requests, in the order in which they come.
          max_new_tokens: most tokens per answer.
          newlines, image_budget: see `Engine`.
        """
        return fitted_engine(
            self._model,
            self.engine_config,
            as_reduction(reduction),
            drafts,
            max_new_tokens=max_new_tokens,
            position_ids=position_ids,
            newlines=newlines,
            image_budget=image_budget,
        )

    def image_size(self, reduction: ReductionLike) -> int:
        """Side in pixels of the images that a reduction wants.

        Raises:
          ValueError: a reduction that this model's tower cannot provide for.
        """
        vision = self.config.vision
        return as_reduction(reduction).image_size(vision.image_size, vision.patch_size)

    def template(self, name: str | None = None) -> Template:
        """A chat template by name; by default the one that the model was trained with.

        Raises:
          ValueError: no such template, or the model's is not known.
        """
        name = name or self.config.chat_template
        if name is None:
            raise ValueError(
                "the model's chat template is not known; expected a conversation, one of "
                f"{sorted(TEMPLATES)}"
            )
        return chat_template(name)

    def placed(self) -> contextlib.AbstractContextManager[None]:
        """The context in which an engine of this model runs: its mesh, if it has one."""
        return sharding.use_mesh(self._model.mesh)

    def processor(self, mode: PictureMode | None, reduction: ReductionLike) -> PictureProcessor:
        """From images to crops as a reduction wants them; None is the model's own mode.

        Raises:
          ValueError: a mode that does not exist, or that model or reduction do not support.
        """
        mode = default_mode(self.config) if mode is None else mode
        return PictureProcessor(self.config, self.image_size(reduction), mode)

    def _builder(
        self, mode: PictureMode | None, conversation: str | None, reduction: ReductionLike
    ) -> RequestBuilder:
        processor = self.processor(mode, reduction)
        return RequestBuilder(self.tokenizer, self.template(conversation), processor)

"""`Llava`: a converted model with its tokenizer, ready to answer and to score."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from prumerge_jax import reductions, sharding
from prumerge_jax.data import conversation as conversations
from prumerge_jax.data.images import ImageMode, ImageSource, load_image, preprocess
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.engine import programs
from prumerge_jax.engine.decoding import generate
from prumerge_jax.engine.engine import Engine, Query, Result
from prumerge_jax.engine.scoring import score
from prumerge_jax.engine.shapes import EngineConfig, fit
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import abstract_model, gather_evidence, inference_layout
from prumerge_jax.reductions import Reduction, ReductionLike, as_reduction
from prumerge_jax.store import model_directory as directories

TOKENIZER = "tokenizer.model"


class Explanation(NamedTuple):
    """What a reduction does to one image.

    Attributes:
      pixels: uint8 [S, S, 3], the image as the tower sees it.
      patch_indices: int32 [n], the kept patches in the order of their tokens.
      assignment: int32 [N], for each patch the index into `patch_indices` of the token it merges
        into, -1 for none.
    """

    pixels: np.ndarray
    patch_indices: np.ndarray
    assignment: np.ndarray


class Llava:
    """A LLaVA on the current devices.

    Attributes:
      config: sizes of the model.
      tokenizer: its SentencePiece tokenizer.
      dtype: compute dtype.
      engine_config: shapes of the compiled programs, before they are fitted to the requests.
    """

    def __init__(
        self,
        config: LlavaConfig,
        graphdef: nnx.GraphDef,
        state: nnx.State,
        tokenizer: Tokenizer,
        *,
        dtype: jnp.dtype,
        engine: EngineConfig | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Wraps weights that are on their devices already; see `load`."""
        if tokenizer.vocab_size > config.text.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model's embedding "
                f"{config.text.vocab_size} rows; they do not belong together"
            )
        self.config, self.tokenizer, self.dtype = config, tokenizer, jnp.dtype(dtype)
        self._graphdef, self._state, self._mesh = graphdef, state, mesh
        self.engine_config = engine or EngineConfig()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: jnp.dtype | None = None,
        engine: EngineConfig | None = None,
        mesh: Mesh | None = None,
    ) -> "Llava":
        """Loads a directory that `convert_weights.py` or `train.py` wrote.

        Args:
          directory: the converted directory; every file is checked against its manifest.
          dtype: of the weights on the device and of the computation; by default as stored.
          engine: shapes of the compiled programs.
          mesh: devices to lay the weights out on (`distributed.sharding.make_mesh`); by default
            the first one. Each weight is read straight into its shards.

        Raises:
          DirectoryError: the directory is incomplete or altered; the message names the file.
        """
        root = pathlib.Path(directory)
        directories.verify(root)
        config = config_json.read_config(root)
        tokenizer = Tokenizer(root / TOKENIZER)
        graphdef, abstract = abstract_model(config, config_json.read_adapter(root))
        stored = directories.read_manifest(root).arrays
        compute = jnp.dtype(dtype or stored["decoder.embed_tokens"].dtype)
        shardings = None if mesh is None else sharding.weight_shardings(abstract, mesh)
        placed = {} if shardings is None else dict(nnx.to_flat_state(shardings))
        leaves = dict(nnx.to_flat_state(abstract))
        targets = {
            ".".join(map(str, path)): jax.ShapeDtypeStruct(
                leaf.shape, compute, sharding=placed[path].get_value() if path in placed else None
            )
            for path, leaf in leaves.items()
        }
        arrays = directories.load_arrays(root, targets)
        state = nnx.from_flat_state(
            {path: leaf.replace(arrays[".".join(map(str, path))]) for path, leaf in leaves.items()}
        )
        with sharding.use_mesh(mesh):
            graphdef, state = inference_layout(graphdef, state)
        return cls(config, graphdef, state, tokenizer, dtype=compute, engine=engine, mesh=mesh)

    def generate(
        self,
        images: Sequence[ImageSource | None],
        prompts: Sequence[str],
        *,
        reduction: ReductionLike = "prumerge",
        max_new_tokens: int = 64,
        image_mode: ImageMode = "pad",
        conversation: str = "vicuna_v1",
        position_ids: PositionIds = "compact",
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers a batch of questions about images.

        Args:
          images: one per prompt: a path, bytes, PIL image or uint8 [H, W, 3]; None asks without.
          prompts: the user's text alone.
          reduction: its spelling, as `prumerge:neighbours=8`; see `reductions.parse`.
          max_new_tokens: most tokens per answer.
          image_mode: `pad` to a square or `crop` the central one.
          conversation: name of a template, see `data.conversation.TEMPLATES`.
          position_ids: `compact` (the reference) or `original`, see `packing.pack_window`.
          temperature: 0 is greedy.
          top_p: smallest probability mass to draw from.
          seed: prompt i draws with seed + i, whatever its batch mates.

        Returns:
          One answer per prompt, in order.

        Raises:
          ImageError: an image cannot be used; the message names it.
          ValueError: a prompt cannot run (the message says which and why), or an unknown name.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        reduction = as_reduction(reduction)
        queries = [
            query._replace(max_new_tokens=max_new_tokens, seed=seed + query.key)
            for query in self._queries(images, prompts, image_mode, conversation, reduction)
        ]
        engine = self.engine(
            reduction,
            [query.text_tokens for query in queries],
            max_new_tokens=max_new_tokens,
            position_ids=position_ids,
        )
        sampling = programs.Sampling(float(temperature), float(top_p))
        with self.placed():
            results = _in_order(generate(engine, queries, sampling), len(queries))
        return [self.tokenizer.decode(result.token_ids) for result in results]

    def score(
        self,
        images: Sequence[ImageSource | None],
        prompts: Sequence[str],
        continuations: Sequence[str],
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: ImageMode = "pad",
        conversation: str = "vicuna_v1",
        position_ids: PositionIds = "compact",
    ) -> list[float]:
        """The log-likelihood of each continuation as the answer to its prompt.

        Arguments and errors as in `generate`.

        Args:
          continuations: the answers' text; it follows the prompt as in training, behind a space.

        Returns:
          Natural logarithms, summed over the continuation's tokens, in order.
        """
        if len(continuations) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations")
        reduction = as_reduction(reduction)
        prompted = self._queries(images, prompts, image_mode, conversation, reduction)
        queries = []
        for query, text in zip(prompted, continuations, strict=True):
            ids = np.array(self.tokenizer.encode(text), np.int32)
            if not len(ids):
                raise ValueError(f"continuation {query.key} is empty; there is nothing to score")
            queries.append(query._replace(continuation=ids))
        text_tokens = [query.text_tokens + len(query.continuation) for query in queries]
        engine = self.engine(reduction, text_tokens, position_ids=position_ids)
        with self.placed():
            results = _in_order(score(engine, queries), len(queries))
        return [result.log_likelihood for result in results]

    def explain(
        self,
        image: ImageSource,
        *,
        reduction: ReductionLike = "prumerge",
        image_mode: ImageMode = "pad",
    ) -> Explanation:
        """Which patches of an image are kept and where the others go; `overlay` draws it."""
        reduction = as_reduction(reduction)
        pixels = self._pixels(image, image_mode, "image", reduction)
        with self.placed():
            assignment = _explain(
                self._graphdef,
                self._state,
                jnp.asarray(pixels[None]),
                reduction=reduction,
                dtype=self.dtype,
            )
        patches, targets, required = (np.asarray(values)[0] for values in assignment)
        if required < 0:
            raise ValueError("the image's CLS attention is not finite; check the weights")
        is_patch = patches >= 0
        place = np.append(np.where(is_patch, np.cumsum(is_patch) - 1, -1), -1)  # of target -1: -1
        return Explanation(pixels, patches[is_patch], place[targets].astype(np.int32))

    def engine(
        self,
        reduction: ReductionLike,
        text_tokens: Sequence[int],
        *,
        max_new_tokens: int = 0,
        position_ids: PositionIds = "compact",
    ) -> Engine:
        """An engine for this model, its shapes fitted to the queries that will run.

        Args:
          reduction, position_ids: as in `generate`.
          text_tokens: of every query, a continuation to score included.
          max_new_tokens: most tokens per answer.
        """
        reduction = as_reduction(reduction)
        vision = dataclasses.replace(self.config.vision, image_size=self.image_size(reduction))
        config = dataclasses.replace(self.config, vision=vision)
        shapes = fit(
            self.engine_config,
            reduction,
            config.vision.num_patches,
            np.array(text_tokens, np.int64),
            max_new_tokens=max_new_tokens,
            max_positions=config.text.max_positions,
        )
        fitting = 1 << max(len(text_tokens) - 1, 0).bit_length()
        if self._mesh is None and fitting < shapes.batch_size:
            shapes = dataclasses.replace(
                shapes,
                batch_size=fitting,
                window=fitting,
                rows=min(shapes.rows, fitting),
                slots=min(shapes.slots, fitting),
            )
        return Engine(
            self._graphdef,
            self._state,
            config,
            reduction,
            shapes,
            dtype=self.dtype,
            position_ids=position_ids,
            mesh=self._mesh,
        )

    def image_size(self, reduction: ReductionLike) -> int:
        """Side in pixels of the images that a reduction wants.

        Raises:
          ValueError: a reduction that this model's tower cannot provide for.
        """
        vision = self.config.vision
        return as_reduction(reduction).image_size(vision.image_size, vision.patch_size)

    def placed(self) -> contextlib.AbstractContextManager[None]:
        """The context in which an engine of this model runs: its mesh, if it has one."""
        return sharding.use_mesh(self._mesh)

    def _queries(
        self,
        images: Sequence[ImageSource | None],
        prompts: Sequence[str],
        image_mode: ImageMode,
        conversation: str,
        reduction: Reduction,
    ) -> list[Query]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts; None is no image")
        if conversation not in conversations.TEMPLATES:
            raise ValueError(
                f"unknown conversation {conversation!r}; "
                f"expected one of {sorted(conversations.TEMPLATES)}"
            )
        template = conversations.TEMPLATES[conversation]
        queries = []
        for key, (image, text) in enumerate(zip(images, prompts, strict=True)):
            prompt = conversations.evaluation_prompt(template, text, has_image=image is not None)
            ids = np.array(self.tokenizer.encode_prompt(prompt), np.int32)
            pixels = None
            if image is not None:
                pixels = self._pixels(image, image_mode, f"image {key}", reduction)
            queries.append(Query(key, ids, pixels))
        return queries

    def _pixels(
        self, image: ImageSource, mode: ImageMode, name: str, reduction: Reduction
    ) -> np.ndarray:
        named = name if not isinstance(image, str | os.PathLike) else f"{name} ({image})"
        loaded = load_image(image, name=named)
        size = self.image_size(reduction)
        return preprocess(loaded, size, mode, self.config.vision.pixel_mean)


def _in_order(results: Iterable[Result], count: int) -> list[Result]:
    """Results by key; any that carries an error is raised."""
    ordered: list[Result | None] = [None] * count
    for result in results:
        if result.error is not None:
            raise ValueError(f"prompt {result.key}: {result.error}")
        ordered[result.key] = result
    return [result for result in ordered if result is not None]


@functools.partial(jax.jit, static_argnames=("graphdef", "reduction", "dtype"))
def _explain(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    *,
    reduction: Reduction,
    dtype: jnp.dtype,
) -> reductions.Assignment:
    vision = nnx.merge(graphdef, state).vision
    evidence = gather_evidence(vision, pixels, dtype=dtype)
    return reductions.explain(evidence, reduction)

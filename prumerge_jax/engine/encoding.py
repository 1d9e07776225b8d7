"""The first station of the engine: a model on its devices, and images to visual tokens on it."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from prumerge_jax import sharding
from prumerge_jax.data import packing
from prumerge_jax.data.asking import asking_columns
from prumerge_jax.data.visual_layout import shared_lengths
from prumerge_jax.engine import programs
from prumerge_jax.engine.places import WindowPlaces
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.families import family_of
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.frames import FrameForm
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Drops, Reduction

_Tree = TypeVar("_Tree")

DTYPES = ("float32", "bfloat16", "float16")
"""Compute dtypes."""


def compute_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """One of `DTYPES`.

    Raises:
      ValueError: another dtype.
    """
    chosen = None
    with contextlib.suppress(TypeError):
        chosen = jnp.dtype(dtype)
    if chosen is None or chosen.name not in DTYPES:
        raise ValueError(f"dtype is {quoted(dtype)}; expected one of {', '.join(DTYPES)}")
    return chosen


def data_shards(mesh: Mesh | None) -> int:
    """Number of shards that a mesh splits a batch into; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedModel:
    """A model on its devices.

    Attributes:
      graphdef, state: a `LlavaModel`, its weights on `mesh` where there is one.
      config: its sizes.
      dtype: compute dtype.
      mesh: devices to split images, rows and slots over; None means one device.
      cache_dtype: dtype of keys and values in pages: int8, or None for that of computation.
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    config: LlavaConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None
    cache_dtype: jnp.dtype | None = None

    @property
    def page_dtype(self) -> jnp.dtype:
        """Dtype of keys and values in pages."""
        return self.cache_dtype or self.dtype

    @property
    def shards(self) -> int:
        """Number of data shards of the mesh."""
        return data_shards(self.mesh)

    @functools.cached_property
    def batch_sharding(self) -> Sharding:
        """The sharding of arrays whose first axis is split over the data shards."""
        if self.mesh is not None:
            return NamedSharding(self.mesh, sharding.logical_spec("batch"))
        (device,) = jax.tree.leaves(self.state)[0].devices()
        return SingleDeviceSharding(device)

    def put(self, x: np.ndarray | jax.Array) -> jax.Array:
        """An array with `batch_sharding`, committed to it.

        Every array that a jitted function takes must come from the same place each time: jax
        compiles one function for committed arguments and another for those that are not.
        """
        return jax.device_put(x, self.batch_sharding)

    def commit(self, tree: _Tree) -> _Tree:
        """Arrays that a jitted function made of nothing, committed as what it makes of others."""
        if self.mesh is not None:  # with a mesh all are
            return tree
        return jax.device_put(tree, self.batch_sharding)

    def put_rows(self, rows: packing.Rows, drops: Drops | None = None) -> programs.Rows:
        """The device's part of a plan; `drops` as in `programs.prefill`."""
        index, weight = (rows.visual_index, None) if rows.taps is None else rows.taps
        return programs.Rows(
            ids=self.put(rows.ids),
            visual_index=self.put(index),
            positions=self.put(rows.positions),
            segment_ids=self.put(rows.segment_ids),
            branch_ids=None if rows.branch_ids is None else self.put(rows.branch_ids),
            visual_weight=None if weight is None else self.put(weight),
            asking=None if drops is None else self.put(asking_columns(rows)),
        )


class Encoding(NamedTuple):
    """A window whose encoding has been dispatched.

    Attributes:
      places: the window's requests, and where their crops are.
      encoded: visual tokens, `batch_size` crops in each.
      reduction: what they were encoded with.
    """

    places: WindowPlaces
    encoded: list[VisualTokens]
    reduction: Reduction


class EncodedImages(NamedTuple):
    """A window's encoded crops in `window_size / batch_size` batches of B = `batch_size`.

    Crop number i is row i % B of batch i // B; whatever where there is no crop.

    Attributes:
      tokens: [B, R, Dv] for each batch, on the device.
      lengths: int32 [B, batches], on the host like all that follow.
      required: int32 [B, batches]; see `prumerge.VisualTokens`.
      patch_indices: int32 [B, batches, pool capacity], -1 beyond R.
      raster: see `CropTokens`.
    """

    tokens: list[jax.Array]
    lengths: np.ndarray
    required: np.ndarray
    patch_indices: np.ndarray
    raster: bool = False


def frame_form(config: LlavaConfig, reduction: Reduction) -> FrameForm | None:
    """How a model's videos are encoded under a reduction; None where as images are.

    Where nothing is pruned, frames are pooled after the projector.
    """
    rule, vision = family_of(config).video, config.vision
    if rule is None:
        return None
    reduces = reduction.reduces(vision.num_patches)
    pooled = -(-vision.grid // rule.pooling) if reduces and rule.pooling > 1 else None
    form = FrameForm(pooled, rule.cls and reduction.frame_cls)
    differs = form != FrameForm() or config.video_tower or reduction.merges_frames
    return form if differs else None


def resized(config: LlavaConfig, reduction: Reduction) -> LlavaConfig:
    """The model with images of the size that a reduction wants."""
    vision = config.vision
    side = reduction.image_size(vision.image_size, vision.patch_size)
    return dataclasses.replace(config, vision=dataclasses.replace(vision, image_size=side))


def token_slots(config: LlavaConfig, reduction: Reduction) -> int:
    """Token slots of every crop: those of the reduction, and one for a frame's CLS feature."""
    form = frame_form(config, reduction)
    capacity = reduction.for_crops(config.most_crops).capacity_for(config.vision.num_patches)
    return capacity + (form is not None and form.cls)


def interpolates(config: LlavaConfig, reduction: Reduction) -> bool:
    """Whether rows may hold tokens of mosaics that are shrunk."""
    return config.anyres_max is not None and not reduction.selects_patches


def has_edges(config: LlavaConfig, reduction: Reduction) -> bool:
    """Whether crops may have patches beside the image that the reduction must not see.

    Without reduction they are left out afterwards, when their slots are put into rows.
    """
    return bool(config.image_grid_pinpoints) and reduction.reduces(config.vision.num_patches)


class Encoder:
    """Encodes the crops of windows of requests."""

    def __init__(self, model: PlacedModel, shapes: EngineShapes) -> None:
        self.model, self.shapes = model, shapes
        self._idle: dict[tuple[int, int], jax.Array] = {}

    def slots(self, reduction: Reduction) -> int:
        """Token slots of every crop, see `token_slots`."""
        return token_slots(self.model.config, reduction)

    def places(self, reduction: Reduction) -> WindowPlaces:
        """An empty window."""
        return WindowPlaces(
            self.shapes,
            self.model.shards,
            grid=self.model.config.vision.grid,
            reads_question=reduction.question_tokens > 0,
            apart=frame_form(self.model.config, reduction) is not None,
            whole_videos=reduction.merges_frames,
        )

    def encode(self, places: WindowPlaces, reduction: Reduction) -> Encoding:
        """Dispatches the encoding of a window; waits for nothing.

        The encoding's reduction is the given one `for_crops` of the model.

        Raises:
          ValueError: an image has another size than the tower takes; the message names its request.
        """
        side = self.model.config.vision.image_size
        reduction = reduction.for_crops(self.model.config.most_crops)
        for request in places.requests:
            for image in request.images:
                if image.crops.shape[1] != side:
                    raise ValueError(
                        f"request {request.key} has an image of side {image.crops.shape[1]}; "
                        f"expected {side}"
                    )
        batches = -(-(1 + max(places.crops, default=-1)) // self.shapes.batch_size)
        encoded = [self._encode(places, reduction, batch) for batch in range(batches)]
        return Encoding(places, encoded, reduction)

    def _encode(self, places: WindowPlaces, reduction: Reduction, batch: int) -> VisualTokens:
        model, size, vision = self.model, self.shapes.batch_size, self.model.config.vision
        pixels = np.zeros((size, vision.image_size, vision.image_size, 3), np.uint8)
        on_image = np.ones((size, vision.num_patches), bool)
        first_frame = np.ones(size, bool)
        questions = [np.zeros(0, np.int32)] * size
        for row in range(size):
            crop = places.crops.get(batch * size + row)
            if crop is not None:
                pixels[row], on_image[row] = crop.pixels, crop.on_image
                questions[row], first_frame[row] = crop.question_ids, crop.is_first
        form = frame_form(model.config, reduction)
        is_video = places.holds_videos(batch)
        with_edges = not is_video and has_edges(model.config, reduction)
        return programs.encode(
            model.graphdef,
            model.state,
            model.put(pixels),
            self._question_ids(questions, reduction),
            model.put(on_image) if with_edges else None,
            model.put(first_frame) if is_video and reduction.merges_frames else None,
            reduction=reduction,
            dtype=model.dtype,
            form=form if is_video else None,
            slots=None if form is None else self.slots(reduction),
        )

    def _question_ids(
        self, questions: Sequence[np.ndarray], reduction: Reduction
    ) -> jax.Array | None:
        """[B, M] int32, -1 beyond a question; None where the reduction reads none."""
        most = reduction.question_tokens
        if not most:
            return None
        ids = np.full((self.shapes.batch_size, most), -1, np.int32)
        for row, question in zip(ids, questions, strict=False):
            row[: len(question)] = question[:most]  # a longer one is refused, see `windows.py`
        return self.model.put(ids)

    def measure(self, encoding: Encoding) -> EncodedImages:
        """Waits for a window's images and fetches what the host must know of them."""
        size, batches = self.shapes.batch_size, self.shapes.window_size // self.shapes.batch_size
        capacity = self.slots(encoding.reduction)
        lengths, required = np.zeros((2, size, batches), np.int32)
        places = max(self.shapes.pool_capacity or 0, capacity)
        patch_indices = np.full((size, batches, places), -1, np.int32)
        for batch, visual in enumerate(encoding.encoded):
            lengths[:, batch], required[:, batch], patch_indices[:, batch, :capacity] = (
                jax.device_get((visual.lengths, visual.required, visual.patch_indices))
            )
        content = [visual.content for visual in encoding.encoded if visual.content is not None]
        if content:
            lengths = self._shared(encoding, lengths, content)
        tokens = [self.model.put(visual.tokens) for visual in encoding.encoded]
        width = self.model.config.vision.width + encoding.reduction.weighs_tokens
        tokens += [self._no_images(capacity, width)] * (batches - len(tokens))
        return EncodedImages(tokens, lengths, required, patch_indices, raster=bool(content))

    def _shared(
        self, encoding: Encoding, lengths: np.ndarray, content: list[jax.Array]
    ) -> np.ndarray:
        """Lengths [B, batches] of crops that share the tokens of their images out; `content` is
        [B, N] of every batch."""
        places, grid = encoding.places, self.model.config.vision.grid
        pictures = (
            (image.layout_on(grid), rows)
            for request, numbers in zip(places.requests, places.numbers, strict=True)
            for image, rows in zip(request.images, numbers, strict=False)  # none of those refused
        )
        by_number = lengths.T.reshape(-1)
        of_crops = np.concatenate(jax.device_get(content))
        kept = shared_lengths(by_number, of_crops, pictures, encoding.reduction)
        return kept.reshape(lengths.T.shape).T

    def _no_images(self, capacity: int, width: int) -> jax.Array:
        """Zeros in place of a batch without images."""
        if (capacity, width) not in self._idle:
            shape = (self.shapes.batch_size, capacity, width)
            self._idle[capacity, width] = self.model.put(np.zeros(shape, self.model.dtype))
        return self._idle[capacity, width]

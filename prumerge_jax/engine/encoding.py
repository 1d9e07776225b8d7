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
from prumerge_jax.engine import programs
from prumerge_jax.engine.request import Request
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction

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
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    config: LlavaConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None

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

    def put_rows(self, rows: packing.Rows) -> programs.Rows:
        """The device's part of a plan."""
        fields = (rows.ids, rows.visual_index, rows.positions, rows.segment_ids)
        return programs.Rows(*(self.put(field) for field in fields))


class Encoding(NamedTuple):
    """A window whose encoding has been dispatched.

    Attributes:
      requests: the window's.
      image_of: the number of each request's image in the window; None without one.
      num_images: number of images to encode.
      encoded: visual tokens, `batch_size` images in each.
      reduction: what they were encoded with.
    """

    requests: list[Request]
    image_of: list[int | None]
    num_images: int
    encoded: list[VisualTokens]
    reduction: Reduction


class EncodedImages(NamedTuple):
    """A window's encoded images in `window_size / batch_size` batches of B = `batch_size`.

    Image i is row i % B of batch i // B; zeros where there is no image.

    Attributes:
      tokens: [B, R, Dv] for each batch, on the device.
      lengths: int32 [B, batches], on the host like all that follow.
      required: int32 [B, batches]; see `prumerge.VisualTokens`.
      patch_indices: int32 [B, batches, R].
    """

    tokens: list[jax.Array]
    lengths: np.ndarray
    required: np.ndarray
    patch_indices: np.ndarray


class Encoder:
    """Encodes the images of windows of requests."""

    def __init__(self, model: PlacedModel, shapes: EngineShapes) -> None:
        self.model, self.shapes = model, shapes
        self._idle: dict[tuple[int, int], jax.Array] = {}

    def encode(self, requests: Sequence[Request], reduction: Reduction) -> Encoding:
        """Dispatches the encoding of a window; waits for nothing.

        Raises:
          ValueError: an image has another size than the tower takes; the message names its request.
        """
        model, size = self.model, self.shapes.batch_size
        side = model.config.vision.image_size
        crops: list[np.ndarray] = []
        questions: list[np.ndarray] = []
        image_of: list[int | None] = []
        known: dict[tuple[str, bytes], int] = {}
        for request in requests:
            if not request.images:
                image_of.append(None)
                continue
            (image,) = request.images
            number = len(crops)
            if image.key is not None:
                asked = request.question_ids.tobytes() if reduction.question_tokens else b""
                number = known.setdefault((image.key, asked), number)
            if number == len(crops):
                if image.crops.shape[1] != side:
                    raise ValueError(
                        f"request {request.key} has an image of side {image.crops.shape[1]}; "
                        f"expected {side}"
                    )
                crops.append(image.crops[0])
                questions.append(request.question_ids)
            image_of.append(number)
        encoded = []
        for start in range(0, len(crops), size):
            pixels = np.zeros((size, side, side, 3), np.uint8)
            pixels[: len(crops) - start] = crops[start : start + size]
            encoded.append(
                programs.encode(
                    model.graphdef,
                    model.state,
                    model.put(pixels),
                    self._question_ids(questions[start : start + size], reduction),
                    reduction=reduction,
                    dtype=model.dtype,
                )
            )
        return Encoding(list(requests), image_of, len(crops), encoded, reduction)

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
        capacity = encoding.reduction.capacity_for(self.model.config.vision.num_patches)
        lengths, required = np.zeros((2, size, batches), np.int32)
        patch_indices = np.full((size, batches, capacity), -1, np.int32)
        for batch, visual in enumerate(encoding.encoded):
            lengths[:, batch], required[:, batch], patch_indices[:, batch] = jax.device_get(
                (visual.lengths, visual.required, visual.patch_indices)
            )
        tokens = [self.model.put(visual.tokens) for visual in encoding.encoded]
        width = self.model.config.vision.width + encoding.reduction.weighs_tokens
        tokens += [self._no_images(capacity, width)] * (batches - len(tokens))
        return EncodedImages(tokens, lengths, required, patch_indices)

    def _no_images(self, capacity: int, width: int) -> jax.Array:
        """Zeros in place of a batch without images."""
        if (capacity, width) not in self._idle:
            shape = (self.shapes.batch_size, capacity, width)
            self._idle[capacity, width] = self.model.put(np.zeros(shape, self.model.dtype))
        return self._idle[capacity, width]

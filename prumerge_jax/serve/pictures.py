"""Images of requests as a model takes them: how many, in how many crops, of how many tokens."""

from collections.abc import Iterable

from PIL import Image

from prumerge_jax import reductions
from prumerge_jax.data.images import OneOfSeveral
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.pictures import PictureMode, PictureProcessor, default_mode
from prumerge_jax.engine.request import ImageInput
from prumerge_jax.engine.shapes import most_visual_tokens
from prumerge_jax.llava import Llava
from prumerge_jax.reductions import Reduction

FULL = reductions.parse("full")


class Pictures:
    """What the images of a request may be.

    Attributes:
      mode: what happens to an image unless the request says otherwise.
      limit: most images of a request.
    """

    def __init__(self, llava: Llava, limit: int, max_pixels: int) -> None:
        """Prepares a model's.

        Raises:
          ValueError: more images than the model takes.
        """
        self._llava, self.limit, self._max_pixels = llava, limit, max_pixels
        self.mode: PictureMode = default_mode(llava.config)
        self._known: dict[Reduction, list[tuple[Layout, ...]]] = {}
        try:
            self.processor(FULL, self.mode).check_number(limit, "a prompt")
        except ValueError as error:
            raise ValueError(f"--max_images {limit}: {error}") from error

    def processor(self, reduction: Reduction, mode: PictureMode) -> PictureProcessor:
        """Makes an image's crops for a reduction.

        Raises:
          ValueError: model or reduction do not support the mode.
        """
        size = self._llava.image_size(reduction)
        return PictureProcessor(self._llava.config, size, mode, max_pixels=self._max_pixels)

    def largest(self, reduction: Reduction) -> tuple[Layout, ...]:
        """Layouts of the images of a request that have the most tokens together."""
        return max(self._possible(reduction), key=lambda images: _tokens(reduction, images))

    def most_tokens(self, reduction: Reduction) -> int:
        """Most visual tokens of a request."""
        return _tokens(reduction, self.largest(reduction))

    @property
    def most_crops(self) -> int:
        """Most crops of a request's images."""
        return max(sum(each.num_crops for each in images) for images in self._possible(FULL))

    def full_tokens(self, images: Iterable[ImageInput]) -> int:
        """Visual tokens that images have without a reduction."""
        config = self._llava.config
        single = Layout(config.vision.grid, newline=config.image_newline).span
        layouts = (image.layout for image in images)
        return sum(
            each.span if each is not None and each.num_crops > 1 else single for each in layouts
        )

    def _possible(self, reduction: Reduction) -> list[tuple[Layout, ...]]:
        """Layouts of one image of every kind, and of as many as there may be, which some models cut
        otherwise."""
        if reduction not in self._known:
            self._known[reduction] = self._find(reduction)
        return self._known[reduction]

    def _find(self, reduction: Reduction) -> list[tuple[Layout, ...]]:
        processor = self.processor(reduction, self.mode)
        sides = self._llava.config.image_grid_pinpoints or ((1, 1),)
        shown = [Image.new("1", (width, height)) for height, width in sides]
        grid = processor.crop_size // self._llava.config.vision.patch_size
        found: list[tuple[Layout, ...]] = []
        for number in {1, self.limit}:
            named = [("largest", each if number == 1 else OneOfSeveral(each)) for each in shown]
            layouts = processor.layouts(named) or (Layout(grid),)
            found += [(each,) * number for each in layouts]
        return found


def _tokens(reduction: Reduction, layouts: Iterable[Layout]) -> int:
    return sum(most_visual_tokens(reduction, layout) for layout in layouts)

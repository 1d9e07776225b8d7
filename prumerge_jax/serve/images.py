"""Images of requests: bounded bytes, decoded in other processes under limits of time and memory."""

import asyncio
import base64
import binascii
import io
import re

from PIL import Image

from prumerge_jax.data.images import ImageError, OneOfSeveral
from prumerge_jax.data.loading import ReaderPool
from prumerge_jax.data.pictures import Picture, PictureProcessor
from prumerge_jax.messages import quoted
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.fetch import Fetcher, FetchPolicy, too_large

_DATA = re.compile(r"data:([^;,]{0,100})(;[^,]{0,100})?,", re.IGNORECASE)
_SHOWN = 200
"""Characters of an URL that an error looks at: it may have millions."""
_REMOTE = re.compile(r"https?:", re.IGNORECASE)


def from_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data URL. What they are is told by the content, not by the label.

    Raises:
      ApiError: 415 no image or not base64, 413 too many bytes, 400 no valid base64.
    """
    head = _DATA.match(url)
    label, encoding = head.groups() if head else ("", None)
    if head is None or not label.lower().startswith("image/") or encoding != ";base64":
        raise ApiError(
            415,
            f"image URL {quoted(url[:_SHOWN])}; expected 'data:image/...;base64,...'",
            param="image_url",
            code="unsupported_media_type",
        )
    if (len(url) - head.end()) * 3 // 4 - 2 > max_bytes:  # padding may hide two
        raise too_large(url[: head.end()], max_bytes)
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400,
            f"image URL {quoted(url[:_SHOWN])} is not base64 ({error})",
            param="image_url",
            code="invalid_base64",
        ) from error
    if len(content) > max_bytes:
        raise too_large(url[: head.end()], max_bytes)
    return content


class Images:
    """From the URL of an image to its pixels."""

    def __init__(self, config: ServeConfig, fetcher: Fetcher | None = None) -> None:
        self._config = config
        self._pool = ReaderPool(
            config.num_workers, config.image_timeout_s, config.image_memory_bytes
        )
        self._fetcher = fetcher or Fetcher(
            FetchPolicy(
                frozenset(config.allow_media_domains),
                config.allow_http,
                config.max_image_bytes,
                config.connect_timeout_s,
                config.fetch_timeout_s,
            )
        )

    async def picture(
        self, url: str, processor: PictureProcessor, *, is_alone: bool = True
    ) -> Picture:
        """An image as the processor makes it.

        Args:
          url: of the image.
          processor: from images to crops.
          is_alone: whether it is the only one of its prompt.

        Raises:
          ApiError: the URL is not allowed, or the image cannot be used.
        """
        content = await self._content(url)
        source = content if is_alone else OneOfSeveral(content)
        picture = await asyncio.wrap_future(self._pool.submit(("image", source), processor))
        if isinstance(picture, ImageError):
            raise ApiError(422, str(picture), param="image_url", code="invalid_image")
        return picture

    def warm_up(self, processor: PictureProcessor) -> None:
        """Starts all readers, for which the first images would wait."""
        dot = io.BytesIO()
        Image.new("RGB", (1, 1)).save(dot, "PNG")
        for _ in range(self._config.num_workers):
            self._pool.submit(("warm-up", dot.getvalue()), processor)

    def close(self) -> None:
        """Ends all readers and fetches, whatever they do."""
        self._pool.close()
        self._fetcher.close()

    async def _content(self, url: str) -> bytes:
        if not _REMOTE.match(url):
            return await asyncio.to_thread(from_data_url, url, self._config.max_image_bytes)
        fetching = self._fetcher.submit(url)
        try:
            # A resolver that hangs is not ended by the fetcher's deadline.
            async with asyncio.timeout(self._config.fetch_timeout_s + 1):
                return await asyncio.wrap_future(fetching)
        except TimeoutError:
            raise ApiError(
                422,
                f"image {quoted(url)} took more than {self._config.fetch_timeout_s:g} seconds; "
                "send it as 'data:image/...;base64,...'",
                param="image_url",
                code="image_not_fetched",
            ) from None

"""Requests about random images, and numbers of visual tokens that are drawn instead of measured."""

import numpy as np

from prumerge_jax.cost.roofline import FRONT_TOKENS
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams
from prumerge_jax.models.config import LlavaConfig

MEANS = {"full": 576.0, "prumerge+": 144.0, "prumerge": 40.0}
"""Mean visual tokens of 576 patches (arXiv 2403.15388)."""
SIGMA = 0.45  # of the logarithm of the counts


class DrawnCounts(Encoder):
    """An encoder that takes the number of visual tokens of each crop of request i to be
    `counts[i]`, a number or one per crop; from the first again after the last."""

    counts: np.ndarray

    def measure(self, encoding: Encoding) -> EncodedImages:
        """The encoder's images with other lengths; every jitted function runs as it does there."""
        images = super().measure(encoding)
        lengths, places = images.lengths.copy(), encoding.places
        for request, of_images in zip(places.requests, places.numbers, strict=True):
            for numbers in of_images:
                batch, row = np.divmod(numbers, len(lengths))
                lengths[row, batch] = self.counts[request.key % len(self.counts)]
        return images._replace(lengths=lengths)


def drawn_counts(number: int, mean: float, most: int, seed: int) -> np.ndarray:
    """Lognormal counts of this mean, [number] int32, from 1 to `most`."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, number)
    return np.clip(np.rint(draws), 1, most).astype(np.int32)


def random_requests(
    config: LlavaConfig,
    number: int,
    text_tokens: int,
    output_tokens: int,
    questions_per_image: int = 1,
    layout: Layout | None = None,
) -> list[Request]:
    """Questions about random images, each with random text of its own in front."""
    rng = np.random.default_rng(0)
    shape = (1 if layout is None else layout.num_crops, *[config.vision.image_size] * 2, 3)
    front_tokens = min(FRONT_TOKENS, text_tokens - 1)
    requests: list[Request] = []
    while len(requests) < number:
        image = ImageInput(
            rng.integers(0, 256, shape, np.uint8), layout, key=f"image {len(requests)}"
        )
        front = rng.integers(3, config.text.vocab_size, front_tokens)
        for _ in range(questions_per_image):
            behind = rng.integers(3, config.text.vocab_size, text_tokens - front_tokens)
            request = Request(
                len(requests),
                np.concatenate([front, [IMAGE_TOKEN], behind]).astype(np.int32),
                (image,),
                continuation=behind[: int(output_tokens == 1)].astype(np.int32),
                sampling=SamplingParams(max_new_tokens=output_tokens),
            )
            requests.append(request)
    return requests[:number]

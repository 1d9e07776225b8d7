"""Requests say at once what is wrong with them."""

import math

import numpy as np
import pytest

from prumerge_jax.data.anyres import Window
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams

ONE = ImageInput(np.zeros((1, 4, 4, 3), np.uint8), Layout(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0; expected a finite number from 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot" * 100}, "temperature is 'hothot"),
        ({"top_p": -3}, "top_p is -3; expected a number above 0 and at most 1"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer, at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"seed": -1}, r"seed is -1; expected an integer from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"stop_ids": (1, 2, 3, 4, 5)}, "stop_ids is .* expected None or a tuple of at most 4"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"stop_ids": 2}, "stop_ids is 2"),
    ],
)
def test_sampling_out_of_bounds_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_sampling_at_its_bounds_is_taken() -> None:
    SamplingParams(temperature=0, top_p=1, max_new_tokens=1, seed=0, stop_ids=())
    SamplingParams(np.float32(2), np.float64(1e-9), np.int64(7), seed=2**32 - 1)  # type: ignore[arg-type]


def test_requests_and_images_are_checked() -> None:
    text, prompt = np.array([1, 5], np.int32), np.array([1, IMAGE_TOKEN, 5], np.int32)
    assert Request(0, prompt, (ONE,)).text_tokens == Request(0, text).text_tokens == 2
    with pytest.raises(ValueError, match="request 7 has 1 image tokens .* and 2 images"):
        Request(7, prompt, (ONE, ONE))
    with pytest.raises(ValueError, match="request 7 has 1 image tokens .* and 0 images"):
        Request(7, prompt)
    with pytest.raises(ValueError, match="request 7 has 0 image tokens .* and 1 images"):
        Request(7, text, (ONE,))
    for shape in ((4, 4, 3), (2, 4, 4, 3), (1, 4, 5, 3), (1, 4, 4, 1)):
        with pytest.raises(ValueError, match=r"crops of uint8 .* expected uint8 \[1, S, S, 3\]"):
            ImageInput(np.zeros(shape, np.uint8), Layout(1))
    with pytest.raises(ValueError, match="crops of float32"):
        ImageInput(np.zeros((1, 4, 4, 3), np.float32), Layout(1))
    tiles = Layout(1, (1, 2), Window(0, 1, 0, 2), (1, 2))
    with pytest.raises(ValueError, match=r"expected uint8 \[3, S, S, 3\]"):
        ImageInput(np.zeros((2, 4, 4, 3), np.uint8), tiles)

"""The public interface, from a directory on disk to answers and scores."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import prumerge_jax
from prumerge_jax import prumerge, sharding
from prumerge_jax.data.images import ImageError
from prumerge_jax.engine.shapes import EngineConfig
from prumerge_jax.store.model_directory import DirectoryError
from tests.conftest import require_eight_devices
from tests.tiny_llava import CONFIG, write_tiny_llava

ENGINE = EngineConfig(
    batch_size=4, window=8, row_length=256, rows=2, slots=4, cache_length=256, chunk=8
)
PROMPTS = ["What is this?", "How many digits are there in the picture?", "Name it."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(directory: pathlib.Path) -> prumerge_jax.Llava:
    return prumerge_jax.Llava.load(directory, engine=ENGINE)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(40 + 30 * i, 70, 3)).astype(np.uint8) for i in range(3)]


@pytest.mark.parametrize("reduction", ["full", "prumerge", "prumerge+"])
def test_a_batch_answers_as_its_members_alone(
    model: prumerge_jax.Llava, images: list[np.ndarray], reduction: str
) -> None:
    together = model.generate(images, PROMPTS, reduction=reduction, max_new_tokens=6)
    alone = [
        model.generate([image], [prompt], reduction=reduction, max_new_tokens=6)[0]
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1, "all answers are the same: the test shows nothing"


def test_scores_rank_the_greedy_answer_first(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    """exp(score) over all one-token continuations is a probability; its peak is greedy decoding."""
    pieces = [model.tokenizer.decode([i]) for i in range(3, model.tokenizer.vocab_size)]
    words = sorted({p for p in pieces if p and len(model.tokenizer.encode(p)) == 1})
    answers = model.generate(images, PROMPTS, max_new_tokens=1)
    at = next(index for index, answer in enumerate(answers) if answer in words)
    scores = model.score([images[at]] * len(words), [PROMPTS[at]] * len(words), words)
    assert 0 < np.exp(scores).sum() <= 1 + 1e-5
    assert words[int(np.argmax(scores))] == answers[at]


def test_a_score_is_the_sum_over_its_tokens(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    """log p(a b) = log p(a) + log p(b | a), the second through a longer prompt."""
    from prumerge_jax.data.conversation import TEMPLATES, evaluation_prompt

    text = "It is a cat"
    whole = model.score([None], [PROMPTS[0]], [text])[0]
    ids = model.tokenizer.encode_prompt(
        evaluation_prompt(TEMPLATES["vicuna_v1"], PROMPTS[0], has_image=False)
    )
    continuation = model.tokenizer.encode(text)
    total = 0.0
    from prumerge_jax.engine.engine import Query
    from prumerge_jax.engine.scoring import score

    engine = model.engine("full", [len(ids) + len(continuation)])

    for i in range(len(continuation)):
        prompt = np.array(ids + continuation[:i], np.int32)
        query = Query(0, prompt, None, continuation=np.array(continuation[i : i + 1], np.int32))
        total += next(score(engine, [query])).log_likelihood
    assert whole == pytest.approx(total, abs=1e-4)


def test_reductions_positions_and_modes_matter(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    def scores(**options) -> list[float]:
        return model.score(images, PROMPTS, ["It is a cat"] * 3, **options)

    base = scores()
    assert scores(reduction=prumerge.preset("prumerge")) == base
    for options in (
        dict(reduction="full"),
        dict(position_ids="original"),
        dict(image_mode="crop"),
        dict(conversation="llava_v1"),
    ):
        assert np.abs(np.subtract(scores(**options), base)).max() > 1e-3, options


def test_text_only_prompts(model: prumerge_jax.Llava, images: list[np.ndarray]) -> None:
    mixed = model.generate([images[0], None], PROMPTS[:2], max_new_tokens=5)
    assert mixed[1] == model.generate([None], [PROMPTS[1]], max_new_tokens=5)[0]


def test_bfloat16(tmp_path: pathlib.Path, images: list[np.ndarray]) -> None:
    # Weights larger than initial ones blow rounding up: the fixture's tell prompts apart instead.
    directory = write_tiny_llava(tmp_path / "tiny", gain=1.0)
    half = prumerge_jax.Llava.load(directory, dtype=jnp.bfloat16, engine=ENGINE)
    assert half.dtype == jnp.bfloat16
    full = prumerge_jax.Llava.load(directory, engine=ENGINE)
    texts = ["a cat"] * 3
    np.testing.assert_allclose(
        half.score(images, PROMPTS, texts), full.score(images, PROMPTS, texts), rtol=0.05
    )


def test_sharded_model_scores_the_same(
    directory: pathlib.Path, model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    require_eight_devices()
    mesh = sharding.make_mesh(2, 2, 2)
    sharded = prumerge_jax.Llava.load(
        directory,
        mesh=mesh,
        engine=EngineConfig(batch_size=4, window=8, row_length=256, rows=4, slots=4),
    )
    kernel = sharded._state["decoder"]["layers"][0]["mlp"]["up_proj"]["kernel"][...]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    texts = ["a cat"] * 3
    np.testing.assert_allclose(
        sharded.score(images, PROMPTS, texts), model.score(images, PROMPTS, texts), atol=1e-4
    )


def test_explain_names_the_kept_patches(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    shown = model.explain(images[1], reduction="prumerge")
    n = CONFIG.vision.num_patches
    assert shown.pixels.shape == (56, 56, 3)
    assert shown.assignment.shape == (n,)
    np.testing.assert_array_equal(
        shown.assignment[shown.patch_indices], np.arange(len(shown.patch_indices))
    )
    assert shown.assignment.max() < len(shown.patch_indices)


def test_errors_name_what_is_wrong(
    model: prumerge_jax.Llava, images: list[np.ndarray], tmp_path: pathlib.Path
) -> None:
    broken = tmp_path / "photo.jpg"
    broken.write_bytes(b"")
    with pytest.raises(ImageError, match=r"image 1 .*photo\.jpg.*empty"):
        model.generate([images[0], broken], PROMPTS[:2])
    with pytest.raises(ValueError, match="prompt 1: the prompt has .* tokens"):
        model.generate([None, None], ["Hi", "word " * 400])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        model.generate([None, None], ["Hi"])
    with pytest.raises(ValueError, match="literal '<image>'"):
        model.generate([images[0]], ["<image> what?"])
    with pytest.raises(ValueError, match="unknown conversation 'v9'"):
        model.generate([None], ["Hi"], conversation="v9")
    with pytest.raises(ValueError, match="unknown reduction 'tome'"):
        model.generate([images[0]], ["Hi"], reduction="tome")
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        model.score([None], ["Hi"], [""])


def test_an_altered_directory_is_refused(tmp_path: pathlib.Path) -> None:
    directory = write_tiny_llava(tmp_path / "tiny")
    weights = [p for p in (directory / "params").rglob("*") if p.is_file()]
    largest = max(weights, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(DirectoryError, match=re.escape(str(largest.relative_to(directory)))):
        prumerge_jax.Llava.load(directory)


def test_pil_images_and_arrays_are_the_same(
    model: prumerge_jax.Llava, images: list[np.ndarray], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(images[0]).save(path)
    sources = [images[0], Image.fromarray(images[0]), path, path.read_bytes()]
    scores = model.score(sources, [PROMPTS[0]] * 4, ["a cat"] * 4)
    assert np.ptp(scores) < 1e-5

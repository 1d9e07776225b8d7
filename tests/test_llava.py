"""The public interface, from a directory on disk to answers and scores."""

import base64
import dataclasses
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import prumerge_jax
from prumerge_jax import prumerge, reductions, sharding
from prumerge_jax.data.images import ImageError
from prumerge_jax.engine.shapes import EngineConfig
from prumerge_jax.models import attention, tuning
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.model_directory import DirectoryError
from tests.conftest import require_eight_devices
from tests.tiny_llava import CONFIG, write_tiny_llava

ENGINE = EngineConfig(
    batch_size=4,
    window_size=8,
    row_length=256,
    prefill_rows=2,
    slots=4,
    cache_length=256,
    decode_steps_per_call=8,
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


def test_a_batch_answers_as_its_members_alone(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    together = model.generate(images, PROMPTS, max_new_tokens=6)
    alone = [
        model.generate([image], [prompt], max_new_tokens=6)[0]
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
    from prumerge_jax.data.templates import TEMPLATES
    from tests.prompts import evaluation_prompt

    text = "It is a cat"
    whole = model.score([None], [PROMPTS[0]], [text])[0]
    ids = model.tokenizer.encode_prompt(
        evaluation_prompt(TEMPLATES["vicuna_v1"], PROMPTS[0], has_image=False)
    )
    continuation = model.tokenizer.encode(text)
    total = 0.0
    from prumerge_jax.engine.build import Draft
    from prumerge_jax.engine.request import Request

    draft = Draft(0, np.array(ids, np.int32), continuation=np.array(continuation, np.int32))
    engine = model.engine("full", [draft])
    for i in range(len(continuation)):
        prompt = np.array(ids + continuation[:i], np.int32)
        target = np.array(continuation[i : i + 1], np.int32)
        total += next(engine.score([Request(0, prompt, continuation=target)])).log_likelihood
    assert whole == pytest.approx(total, abs=1e-4)


def test_logits_give_the_score(model: prumerge_jax.Llava, images: list[np.ndarray]) -> None:
    ids = model._builder(None, None, "prumerge").token_ids(PROMPTS[0], 1)
    continuation = np.array(model.tokenizer.encode("It is a cat"))
    prompts = [np.concatenate([ids, continuation]), [1, 5, 7]]
    logits, of_text = model.logits([images[0], None], prompts, reduction="prumerge")
    assert of_text.shape == (3, model.config.text.vocab_size)
    read = logits[-len(continuation) - 1 : -1]
    log_likelihoods = read - np.log(np.exp(read).sum(-1, keepdims=True))
    total = log_likelihoods[np.arange(len(continuation)), continuation].sum()
    assert total == pytest.approx(
        model.score([images[0]], PROMPTS[:1], ["It is a cat"])[0], abs=1e-4
    )
    (full,) = model.logits([images[0]], prompts[:1])
    assert len(full) == len(prompts[0]) - 1 + model.config.vision.num_patches


@pytest.mark.slow
def test_reductions_positions_and_modes_matter(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    def scores(**options) -> list[float]:
        return model.score(images, PROMPTS, ["It is a cat"] * 3, **options)

    base = scores()
    assert scores(reduction=prumerge.preset("prumerge")) == base
    assert scores(reduction=reductions.parse("prumerge")) == base
    few = scores(reduction="prumerge:neighbours=2")
    assert scores(reduction=prumerge.preset("prumerge", neighbours=2)) == few
    for options in (
        dict(reduction="full"),
        dict(reduction="prumerge:neighbours=2"),
        dict(reduction="downsample:2"),
        dict(position_ids="original"),
        dict(image_mode="crop"),
        dict(conversation="llava_v1"),
    ):
        assert np.abs(np.subtract(scores(**options), base)).max() > 1e-3, options


@pytest.mark.slow
def test_a_reduction_that_reads_the_question(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    """Each question has tokens of its own, whatever else is asked of the image."""
    reading = {"reduction": "mmtok:tokens=3"}
    asked = [images[0]] * 3, ["What is a cat?", "Name the table near a window.", "What is a cat?"]
    kept = [
        model.explain(images[0], question=prompt, **reading).patch_indices
        for prompt in asked[1][:2]
    ]
    assert list(kept[0]) != list(kept[1])
    together = model.score(*asked, ["It is"] * 3, **reading)
    alone = [model.score([images[0]], [p], ["It is"], **reading)[0] for p in asked[1]]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert model.score([None], PROMPTS[:1], ["It is"], **reading) == pytest.approx(
        model.score([None], PROMPTS[:1], ["It is"]), abs=1e-5
    )
    builder = model._builder("pad", "vicuna_v1", reading["reduction"])
    drafts = [
        dataclasses.replace(draft, images=(("one name", images[0]),), continuation=np.array([5]))
        for draft in builder.drafts(*asked)
    ]
    engine = model.engine(reading["reduction"], drafts)
    assert len(list(engine.score(builder.requests(drafts)))) == 3
    assert engine.counters.images == 2


def test_a_question_that_cannot_be_read_is_named(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=r"'mmtok:tokens=3' reads the question: .* got None"):
        model.explain(images[0], reduction="mmtok:tokens=3")
    short = "mmtok:tokens=3,question_tokens=2"
    with pytest.raises(
        ValueError, match=r"prompt 1: the question's keywords have \d+ tokens; .* 2"
    ):
        model.score(images[:2], ["a", "cat table window"], ["It"] * 2, reduction=short)


def test_text_only_prompts(model: prumerge_jax.Llava, images: list[np.ndarray]) -> None:
    mixed = model.generate([images[0], None], PROMPTS[:2], max_new_tokens=5)
    assert mixed[1] == model.generate([None], [PROMPTS[1]], max_new_tokens=5)[0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_sharded_model_scores_the_same(
    directory: pathlib.Path, model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    require_eight_devices()
    mesh = sharding.make_mesh(2, 2, 2)
    sharded = prumerge_jax.Llava.load(
        directory,
        mesh=mesh,
        engine=EngineConfig(batch_size=4, window_size=8, row_length=256, prefill_rows=4, slots=4),
    )
    kernel = sharded._model.state["decoder"]["layers"][0]["mlp"]["up_proj"]["kernel"][...]
    assert sorted(kernel.sharding.spec) == ["fsdp", "tensor"]  # CPUs have [out, in]
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
    small = model.explain(images[1], reduction="downsample:2")
    assert small.pixels.shape == (28, 28, 3)
    np.testing.assert_array_equal(small.patch_indices, np.arange(4))
    np.testing.assert_array_equal(small.assignment, np.arange(4))


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
    with pytest.raises(ValueError, match="unknown reduction 'halving'"):
        model.generate([images[0]], ["Hi"], reduction="halving")
    with pytest.raises(ValueError, match="no such parameter 'neighbour'"):
        model.score([images[0]], ["Hi"], ["a"], reduction="prumerge:neighbour=8")
    with pytest.raises(ValueError, match="a grid from 1 to 3"):
        model.explain(images[0], reduction="downsample:4")
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        model.score([None], ["Hi"], [""])


def test_mistakes_in_arguments_are_said_in_a_line(model: prumerge_jax.Llava) -> None:
    url = "data:image/png;base64,!" + "A" * 400_000
    for arguments, options, message in (
        (("a.jpg", "What?"), {}, r"expected a list of prompts, got str 'What\?'"),
        (("a.jpg", ["What?"]), {}, r"expected a list of images, got str 'a\.jpg'"),
        ((np.zeros((4, 4, 3), np.uint8), ["a"] * 4), {}, "expected a list of images, got ndarray"),
        ((None, ["What?"]), {}, "expected a list of images, got NoneType None"),
        (([None], [None]), {}, "prompt 0 is None; expected a string"),
        (([None, None], ["Hi", 7]), {}, "prompt 1 is 7; expected a string"),
        (([["a.jpg", "b.jpg"]], ["What?"]), {}, "prompt 0 has 2 images; the model takes one image"),
        (([7], ["What?"]), {}, "image 0 is 7; expected a path"),
        (([url], ["What?"]), {}, "image 0: the data URL 'data:image/png"),
        (([None], ["x"]), {"temperature": -1}, "temperature is -1; expected"),
        (([None], ["x"]), {"top_p": -3.0}, r"top_p is -3\.0; expected"),
        (([None], ["x"]), {"seed": -1}, "seed is -1; expected"),
        (([None], ["x"]), {"max_new_tokens": 0}, "max_new_tokens is 0; expected"),
        (([None], ["x"]), {"image_mode": "stretch"}, "unknown image mode 'stretch'"),
        (([None], ["x"]), {"position_ids": "sparse"}, "position_ids is 'sparse'"),
        (([None], ["x"]), {"conversation": "v" * 9000}, "unknown conversation 'vvvv"),
    ):
        for call in (model.generate, model.stream):
            with pytest.raises(ValueError, match=message) as refused:
                call(*arguments, **options)
            assert "\n" not in str(refused.value)
            assert len(str(refused.value)) < 300
    for continuations, message in (
        ("yes", "expected a list of continuations, got str 'yes'"),
        ([3], "a list|expected a string"),
        ([["a", None]], "a continuation of prompt 0 is None; expected a string"),
        (["a", "b"], "1 prompts but 2 continuations"),
        ([["a", ""]], "continuation 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score([None], ["Hi"], continuations)


def test_one_image_may_come_in_a_tuple_or_a_data_url(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    sources = [images[0], (images[0],), [images[0]], url]
    scores = model.score(sources, [PROMPTS[0]] * 4, ["a cat"] * 4)
    assert np.ptp(scores) < 1e-5
    assert model.score([()], [PROMPTS[0]], ["a cat"]) == model.score(
        [None], [PROMPTS[0]], ["a cat"]
    )


def test_several_continuations_of_a_prompt_are_a_list(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    choices = [["a cat", "a table", "three"], ["7"], []]
    scores = model.score(images, PROMPTS, choices)
    assert [len(each) for each in scores] == [3, 1, 0]
    flat = model.score([images[0]] * 3 + [images[1]], [PROMPTS[0]] * 3 + [PROMPTS[1]],
                       [text for texts in choices for text in texts])  # fmt: skip
    np.testing.assert_allclose([s for each in scores for s in each], flat, atol=1e-4)
    assert model.score([], [], []) == []


def test_a_stream_adds_up_to_the_answers(
    model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 2**32 - 1}):
        expected = model.generate(images, PROMPTS, max_new_tokens=20, **options)
        texts = [""] * len(PROMPTS)
        count = 0
        for index, piece in model.stream(images, PROMPTS, max_new_tokens=20, **options):
            assert piece
            texts[index] += piece
            count += 1
        assert texts == expected
        assert count > len(PROMPTS)


def test_other_dtypes_and_sizes_are_refused_before_a_weight_is_read(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("weights were hashed or read")

    monkeypatch.setattr(directories, "verify", unexpected)
    monkeypatch.setattr(directories, "load_arrays", unexpected)
    for dtype in ("int8", jnp.int8, "float64", "half-ish", 7):
        with pytest.raises(
            ValueError, match="dtype is .*; expected one of float32, bfloat16, float16"
        ):
            prumerge_jax.Llava.load(directory, dtype=dtype)
    require_eight_devices()
    mesh = sharding.make_mesh(data=8)
    with pytest.raises(ValueError, match="--config.engine.prefill_rows to a multiple of 8"):
        prumerge_jax.Llava.load(directory, mesh=mesh, engine=EngineConfig(prefill_rows=2))


def test_a_directory_without_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    directory = write_tiny_llava(tmp_path / "tiny")
    (directory / "tokenizer.model").unlink()
    with pytest.raises(DirectoryError, match=r"tiny: no tokenizer\.model"):
        prumerge_jax.Llava.load(directory)


def test_the_miniature_has_a_name() -> None:
    model = prumerge_jax.Llava.load("miniature")
    (answer,) = model.generate([None], ["How many digits are there?"], max_new_tokens=3)
    assert isinstance(answer, str)
    assert model.config.vision.num_patches == 144


@pytest.mark.slow
def test_defaults_of_the_engine_fit_the_mesh(
    directory: pathlib.Path, model: prumerge_jax.Llava, images: list[np.ndarray]
) -> None:
    require_eight_devices()
    sharded = prumerge_jax.Llava.load(directory, mesh=sharding.make_mesh(data=8))
    assert sharded.engine_sizes.prefill_rows == 8
    texts = ["a cat"] * 3
    np.testing.assert_allclose(
        sharded.score(images, PROMPTS, texts), model.score(images, PROMPTS, texts), atol=1e-4
    )


def test_images_are_padded_with_the_towers_own_mean(tmp_path: pathlib.Path) -> None:
    vision = dataclasses.replace(CONFIG.vision, pixel_mean=(0.5, 0.25, 0.75))
    config = dataclasses.replace(CONFIG, vision=vision)
    model = prumerge_jax.Llava.load(write_tiny_llava(tmp_path / "tiny", config), engine=ENGINE)
    wide = np.full((20, 60, 3), 255, np.uint8)
    assert model.explain(wide).pixels[0, 0].tolist() == [127, 63, 191]


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


@pytest.mark.slow
def test_explain_and_generate_attend_alike(
    model: prumerge_jax.Llava, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn over an image is what was generated from, to the last bit of the tower."""
    used = []
    for name, attend in attention._BACKENDS.items():

        def spy(*arrays: jax.Array, name=name, attend=attend, **options: object) -> jax.Array:
            used.append(name)
            return attend(*arrays, **options)

        monkeypatch.setitem(attention._BACKENDS, name, spy)
    # A tuning that nothing else is compiled with: what is cached would not be traced again.
    with tuning.use(tuning.Tuning(attention="blocks", rotary="matmul")):
        model.explain(images[0])
        explained, used[:] = set(used), []
        model.generate(images[:1], PROMPTS[:1], max_new_tokens=1)
        generated = set(used)
    assert explained == generated == {"blocks"}

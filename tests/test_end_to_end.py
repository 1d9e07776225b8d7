"""From a Hugging Face directory to answers, with the README's commands, against transformers."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")

from PIL import Image  # noqa: E402

import prumerge_jax  # noqa: E402
from prumerge_jax.data.images import normalize, preprocess  # noqa: E402
from prumerge_jax.data.templates import TEMPLATES  # noqa: E402
from prumerge_jax.engine.shapes import EngineConfig  # noqa: E402
from prumerge_jax.models.config import LlavaConfig, TextConfig, published  # noqa: E402
from tests.models.torch_llava import random_torch_llava  # noqa: E402
from tests.programs import run_program  # noqa: E402
from tests.prompts import evaluation_prompt  # noqa: E402
from tests.tiny_llava import tokenizer_model  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=448, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=512,
    ),
    image_token_id=440,
    pad_token_id=441,
)  # fmt: skip
PROMPTS = [
    "What is this?",
    "How many digits are there in the picture, and which of them is the largest?",
    "Name it.\nAnswer the question using a single word or phrase.",
]
ENGINE = EngineConfig(
    batch_size=4,
    window_size=4,
    row_length=256,
    prefill_rows=2,
    slots=4,
    cache_length=256,
    decode_steps_per_call=8,
)


@pytest.fixture(scope="module")
def oracle() -> torch.nn.Module:
    return random_torch_llava(CONFIG)


@pytest.fixture(scope="module")
def converted(oracle: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`convert_weights.py` run as a user runs it, on a directory transformers wrote."""
    folder = tmp_path_factory.mktemp("checkpoints")
    oracle.save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(tokenizer_model())
    done = run_program(
        "convert_weights.py", f"--input={folder / 'hf'}", f"--output={folder / 'jax'}"
    )
    assert done.returncode == 0, done.stderr
    return folder / "jax"


@pytest.fixture(scope="module")
def model(converted: pathlib.Path) -> prumerge_jax.Llava:
    return prumerge_jax.Llava.load(converted, engine=ENGINE)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (30, 90), (77, 77)]
    return [rng.integers(0, 256, size=(*size, 3)).astype(np.uint8) for size in sizes]


def oracle_inputs(
    model: prumerge_jax.Llava, photos: list[np.ndarray], config: LlavaConfig
) -> dict[str, torch.Tensor]:
    """The same batch for transformers, padded on the left."""
    rows = []
    for text in PROMPTS:
        template = TEMPLATES["vicuna_v1"]
        ids = model.tokenizer.encode_prompt(evaluation_prompt(template, text))
        at = ids.index(-200)
        rows.append(ids[:at] + [440] * config.vision.num_patches + ids[at + 1 :])
    width = max(map(len, rows))
    size = config.vision.image_size
    pixels = [normalize(preprocess(Image.fromarray(p), size, "pad")) for p in photos]
    return {
        "input_ids": torch.tensor([[441] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        "pixel_values": torch.tensor(np.stack(pixels).transpose(0, 3, 1, 2)),
    }


def test_greedy_answers_equal_transformers(
    oracle: torch.nn.Module, model: prumerge_jax.Llava, photos: list[np.ndarray]
) -> None:
    inputs = oracle_inputs(model, photos, CONFIG)
    with torch.no_grad():
        out = oracle.generate(
            **inputs, max_new_tokens=32, do_sample=False, pad_token_id=441, eos_token_id=2
        )
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    expected = [model.tokenizer.decode([t for t in row if t < 440]) for row in new]
    got = model.generate(photos, PROMPTS, reduction="full", max_new_tokens=32)
    assert got == expected
    assert len(set(got)) == len(got), "equal answers: the test shows nothing"


def test_log_likelihoods_equal_transformers(
    oracle: torch.nn.Module, model: prumerge_jax.Llava, photos: list[np.ndarray]
) -> None:
    inputs = oracle_inputs(model, photos, CONFIG)
    answer = model.tokenizer.encode("It is a cat")
    batch = len(photos)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer] * batch)], dim=1)
    ones = torch.ones(batch, len(answer), dtype=torch.long)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    with torch.no_grad():
        logits = oracle(**inputs).logits[:, -len(answer) - 1 : -1]
    chosen = torch.log_softmax(logits, -1)[:, torch.arange(len(answer)), answer].sum(-1)
    got = model.score(photos, PROMPTS, ["It is a cat"] * batch, reduction="full")
    np.testing.assert_allclose(got, chosen.numpy(), atol=1e-4)


@pytest.mark.slow
def test_readme_commands_answer_about_a_photo(
    converted: pathlib.Path, photos: list[np.ndarray], tmp_path: pathlib.Path
) -> None:
    """The README's lines from a converted directory to an answer and to an overlay."""
    photo = tmp_path / "photo.jpg"
    Image.fromarray(photos[0]).save(photo)
    program = (
        "from prumerge_jax import Llava\n"
        f"model = Llava.load({str(converted)!r})\n"
        f"print(model.generate([{str(photo)!r}], ['What is this?'], reduction='prumerge'))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert out.stdout.strip().startswith("['")
    overlay = tmp_path / "kept.png"
    subprocess.run(
        [
            sys.executable, "-m", "prumerge_jax.visualize", f"--checkpoint={converted}",
            f"--image={photo}", f"--output={overlay}",
        ],
        check=True, cwd=ROOT,
    )  # fmt: skip
    assert Image.open(overlay).size[0] > 500

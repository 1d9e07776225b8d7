"""Loss and adapter gradients of several crops and videos against transformers and PEFT."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")
pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

from configs import common  # noqa: E402
from prumerge_jax.data.images import OneOfSeveral, Video, image_size, normalize  # noqa: E402
from prumerge_jax.data.pictures import Picture  # noqa: E402
from prumerge_jax.data.pipeline import Example  # noqa: E402
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN  # noqa: E402
from prumerge_jax.sharding.mesh import make_mesh, use_mesh  # noqa: E402
from prumerge_jax.training.config import parse, with_sizes  # noqa: E402
from prumerge_jax.training.objectives.next_token import crop_packer  # noqa: E402
from prumerge_jax.training.objectives.registry import make_objective  # noqa: E402
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from prumerge_jax.training.step import Sums, TrainStep, state_shardings  # noqa: E402
from tests.families import GoldenModel  # noqa: E402
from tests.models.torch_llava import with_random_adapters  # noqa: E402
from tests.training.test_torch_parity import torch_adapter  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

RANK, ALPHA = 4, 8.0
IMAGE_ID, VIDEO_ID = 250, 251


def example(number: int, pictures: list[Picture], places: list[int]) -> Example:
    """Random text with the pictures at these places, the second half of it learned."""
    text = np.random.default_rng(number).integers(3, 240, 14).astype(np.int32)
    labels = np.where(np.arange(14) < 7, IGNORE, text).astype(np.int32)
    return Example(
        id=f"sample {number}",
        pixels=np.zeros((0, 0, 3), np.uint8),
        has_image=bool(pictures),
        token_ids=np.insert(text, places, IMAGE_TOKEN),
        labels=np.insert(labels, places, IGNORE),
        mismatch=False,
        pictures=tuple(pictures),
    )


def next_examples(model: GoldenModel) -> list[Example]:
    """One image, two of them, and text alone."""
    return [
        example(0, [shown(model, "wide_97x61")], [3]),
        example(1, [shown(model, n, several=True) for n in ("square_56", "tall_41x200")], [2, 5]),
        example(2, [], []),
    ]


def onevision_examples(model: GoldenModel) -> list[Example]:
    """One image whose mosaic is shrunk, two that are not cut, and a video."""
    names = [case.split("/")[1] for case in model.cases if case.startswith("image/")]
    shrunk = next(n for n in names if shown(model, n).layout.shape != window(shown(model, n)))
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (40, 60, 3)).astype(np.uint8) for _ in range(3)]
    return [
        example(0, [shown(model, shrunk)], [3]),
        example(1, [shown(model, n, several=True) for n in names[1:3]], [2, 5]),
        example(2, [model.processor(Video(frames))], [4]),
    ]


SIZES: dict[bytes, tuple[int, int]] = {}
"""Height and width of the image that crops are of."""


def shown(model: GoldenModel, name: str, *, several: bool = False) -> Picture:
    """An image as the model takes it."""
    file = model.image(name)
    picture = model.processor(OneOfSeveral(file) if several else file)
    SIZES[picture.crops.tobytes()] = image_size(file)
    return picture


def window(picture: Picture) -> tuple[int, int]:
    return picture.layout.window.rows, picture.layout.window.columns


def torch_inputs(model: GoldenModel, sample: Example) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The arguments of a forward pass of transformers, and the labels of its sequence."""
    spans = [picture.layout.span for picture in sample.pictures]
    kinds = [VIDEO_ID if p.layout.frames else IMAGE_ID for p in sample.pictures]
    is_image = sample.token_ids == IMAGE_TOKEN
    widths, ids = np.ones(len(is_image), int), sample.token_ids.copy()
    widths[is_image], ids[is_image] = spans, kinds
    inputs = {"input_ids": torch.tensor(np.repeat(ids, widths)).long()[None]}
    vision = model.config.vision
    pixels = [
        normalize(p.crops, vision.pixel_mean, vision.pixel_std).transpose(0, 3, 1, 2)
        for p in sample.pictures
    ]
    if VIDEO_ID in kinds:
        inputs["pixel_values_videos"] = torch.tensor(np.stack(pixels))
    elif pixels:
        most = max(map(len, pixels))
        padded = [np.pad(p, ((0, most - len(p)), *[(0, 0)] * 3)) for p in pixels]
        inputs["pixel_values"] = torch.tensor(np.stack(padded))
        inputs["image_sizes"] = torch.tensor([SIZES[p.crops.tobytes()] for p in sample.pictures])
        if model.config.anyres_max is not None:
            inputs["batch_num_images"] = torch.tensor([len(pixels)])
    return inputs, np.repeat(sample.labels, widths)


def oracle(folder: pathlib.Path) -> torch.nn.Module:
    """The golden model with random adapters on every linear layer of its language model."""
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return with_random_adapters(loaded, RANK, ALPHA).eval()


def torch_loss(model: torch.nn.Module, golden: GoldenModel, samples: list[Example]) -> torch.Tensor:
    """Mean over all target tokens of all samples, one sample at a time, nothing packed."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        inputs, labels = torch_inputs(golden, sample)
        logits = model(**inputs).logits[0, :-1]
        targets = torch.tensor(labels).long()[1:]
        total = total + torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        )
        count += int((targets != -100).sum())
    return total / count


def our_sums(
    golden: GoldenModel, adapters: dict[str, torch.Tensor], samples: list[Example]
) -> Sums:
    config = common.training()
    config.learning_rates = (("decoder.*.lora_?", 1e-3),)
    config.adapter = ml_collections.ConfigDict({"rank": RANK, "alpha": ALPHA, "dropout": 0.0})
    config.batch_size = len(samples)
    config.crops_per_sample = 8
    config.dtype = "float32"
    config.max_length = 256
    config.remat = "full"
    parsed = with_sizes(parse(config), golden.config)
    objective = make_objective(parsed)
    flat = nnx.to_flat_state(nnx.state(golden.model))
    weights = {".".join(map(str, path)): variable[...] for path, variable in flat}
    for path in objective.learning_rates:
        weights[path] = jnp.asarray(torch_adapter(adapters, path))
    mesh = make_mesh()
    shardings = objective.module.shardings(mesh)
    weights = {path: jax.device_put(weights[path], shardings[path]) for path in shardings}
    optimizer = make_optimizer(OptimizerConfig(), 1, objective.learning_rates)
    state = state_shardings(optimizer, objective.trained(), shardings, mesh)
    step = TrainStep(objective.loss, optimizer, seed=0, shardings=state)
    trained = {path: weights[path] for path in objective.learning_rates}
    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        feed = crop_packer(
            dataclasses.replace(parsed, run=dataclasses.replace(parsed.run, rows_per_shard=2)),
            weights,
            mesh,
        )
        (batch,) = feed([samples], 0)
        assert batch.counts["visual_tokens"] == sum(
            picture.layout.span for sample in samples for picture in sample.pictures
        )
        frozen = {path: w for path, w in weights.items() if path not in trained}
        sums = step.zeros(trained)
        for number, rows in enumerate(batch.batches):
            when = np.array([0, number], np.int32)
            sums = step.accumulate(sums, trained, frozen, rows, when)
        return sums


@pytest.mark.parametrize(
    ("name", "make"), [("next_vicuna", next_examples), ("onevision_tied", onevision_examples)]
)
def test_loss_and_gradients_equal_transformers_and_peft(
    golden: pathlib.Path, name: str, make: Callable[[GoldenModel], list[Example]]
) -> None:
    tiny = GoldenModel(golden, name)
    samples = make(tiny)
    model = oracle(golden / "models" / name)
    loss = torch_loss(model, tiny, samples)
    loss.backward()
    base = dict(model.get_base_model().named_parameters())
    adapters = {name: w for name, w in base.items() if "lora_" in name}
    sums = our_sums(tiny, adapters, samples)
    assert float(sums.loss / sums.targets) == pytest.approx(loss.item(), abs=1e-4)
    gradients = {name: weight.grad for name, weight in adapters.items()}
    assert len(sums.gradient) == 14
    for path, summed in sums.gradient.items():
        ours, theirs = np.asarray(summed / sums.targets), torch_adapter(gradients, path)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, (path, error)

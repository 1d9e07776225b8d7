"""Loss and gradients of LLaVA-format samples against transformers and PEFT, float32, all tokens."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from PIL import Image

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")
pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

from configs import common  # noqa: E402
from prumerge_jax.data.images import ImageProcessor  # noqa: E402
from prumerge_jax.data.pipeline import Example, Preprocessor  # noqa: E402
from prumerge_jax.data.templates import TEMPLATES  # noqa: E402
from prumerge_jax.data.tokenizer import Tokenizer  # noqa: E402
from prumerge_jax.data.tokens import IMAGE_TOKEN  # noqa: E402
from prumerge_jax.models.config import TextConfig, published  # noqa: E402
from prumerge_jax.sharding.mesh import make_mesh, use_mesh  # noqa: E402
from prumerge_jax.training.batches import BatchPacker, RowShape  # noqa: E402
from prumerge_jax.training.config import parse, with_sizes  # noqa: E402
from prumerge_jax.training.objectives.next_token import ImageEncoder  # noqa: E402
from prumerge_jax.training.objectives.registry import make_objective  # noqa: E402
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from prumerge_jax.training.step import Sums, TrainStep, state_shardings  # noqa: E402
from tests.models.torch_llava import (  # noqa: E402
    our_state,
    random_torch_llava,
    with_random_adapters,
)

pytestmark = pytest.mark.torch

IMAGE_ID = 350
MODEL = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=352, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=256,
    ),
    image_token_id=IMAGE_ID,
)  # fmt: skip
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer) -> list[Example]:
    """One turn, several turns, and text alone."""
    preprocess = Preprocessor(
        tokenizer,
        TEMPLATES["v1"],
        ImageProcessor(MODEL.vision.image_size, MODEL.vision.pixel_mean),
    )
    rng = np.random.default_rng(0)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60, 56, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [
        {"conversations": turns("<image>\nIs there a 3?", "yes"), "image": png()},
        {
            "conversations": turns(
                "<image>\nWhich digit is in the north?", "7", "How many digits are there?", "2"
            ),
            "image": png(),
        },
        {"conversations": turns("How many of the digits are 4?", "1")},
    ]
    return [preprocess({"id": str(i), **sample}) for i, sample in enumerate(samples)]


@pytest.fixture(scope="module")
def oracle() -> torch.nn.Module:
    """A random LLaVA with adapters on every linear layer of its language model."""
    model = with_random_adapters(random_torch_llava(MODEL), RANK, ALPHA)
    for name, weight in model.named_parameters():
        if "multi_modal_projector" in name:
            weight.requires_grad_(True)
    return model.eval()


def torch_loss(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Mean over all target tokens of all samples, one sample at a time, nothing packed."""
    vision = MODEL.vision
    total, count = torch.zeros(()), 0
    for example in examples:
        widths = np.where(example.token_ids == IMAGE_TOKEN, vision.num_patches, 1)
        ids = np.where(example.token_ids == IMAGE_TOKEN, IMAGE_ID, example.token_ids)
        pixels = (example.pixels / 255 - vision.pixel_mean) / vision.pixel_std
        inputs = {"input_ids": torch.tensor(np.repeat(ids, widths))[None]}
        if example.has_image:
            chw = pixels.transpose(2, 0, 1).astype(np.float32)
            inputs["pixel_values"] = torch.tensor(chw)[None]
        logits = model(**inputs).logits[0, :-1]
        labels = torch.tensor(np.repeat(example.labels, widths)).long()[1:]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    return total / count


def our_sums(oracle: torch.nn.Module, examples: list[Example]) -> Sums:
    config = common.training()
    config.learning_rates = (("decoder.*.lora_?", 1e-3), ("projector.*", 1e-3))
    config.adapter = ml_collections.ConfigDict({"rank": RANK, "alpha": ALPHA, "dropout": 0.0})
    config.batch_size = len(examples)
    config.dtype = "float32"
    config.max_length = 192
    config.remat = "full"
    parsed = with_sizes(parse(config), MODEL)
    objective = make_objective(parsed)
    base = oracle.get_base_model()
    adapters = {name: w for name, w in base.named_parameters() if "lora_" in name}
    plain = random_torch_llava(MODEL)
    flat = nnx.to_flat_state(our_state(plain, MODEL)[1])
    weights = {".".join(path): variable[...] for path, variable in flat}
    for path in objective.learning_rates:
        if "lora_" in path:
            weights[path] = jnp.asarray(torch_adapter(adapters, path))
    mesh = make_mesh()
    shardings = objective.module.shardings(mesh)
    weights = {path: jax.device_put(weights[path], shardings[path]) for path in shardings}
    optimizer = make_optimizer(OptimizerConfig(), 1, objective.learning_rates)
    state = state_shardings(optimizer, objective.trained(), shardings, mesh)
    step = TrainStep(objective.loss, optimizer, seed=0, shardings=state)
    trained = {path: weights[path] for path in objective.learning_rates}
    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        feed = BatchPacker(
            ImageEncoder(parsed, weights, mesh),
            num_patches=MODEL.vision.num_patches,
            shape=RowShape(2, config.max_length),
            mesh=mesh,
        )
        ((batch,), _, counts) = next(feed([examples], 0))
        assert (counts["images"], counts["visual_tokens"]) == (2, 32)
        frozen = {path: w for path, w in weights.items() if path not in trained}
        return step.accumulate(step.zeros(trained), trained, frozen, batch, np.zeros(2, np.int32))


def torch_adapter(tensors: dict[str, torch.Tensor], path: str) -> np.ndarray:
    """The stacked adapter at one of our paths: `decoder.layers.<inner>.lora_a`."""
    *inner, leaf = path.removeprefix("decoder.layers.").split(".")
    suffix = f"{'.'.join(inner)}.lora_{leaf[-1].upper()}.default.weight"
    return np.stack(
        [
            next(v for k, v in tensors.items() if k.endswith(f"layers.{layer}.{suffix}"))
            .detach()
            .numpy()
            .T
            for layer in range(MODEL.text.num_layers)
        ]
    )


@pytest.mark.slow
def test_loss_and_gradients_equal_transformers_and_peft(
    oracle: torch.nn.Module, examples: list[Example]
) -> None:
    loss = torch_loss(oracle, examples)
    loss.backward()
    sums = our_sums(oracle, examples)
    assert float(sums.loss / sums.targets) == pytest.approx(loss.item(), abs=1e-4)
    gradients = {
        name: weight.grad
        for name, weight in oracle.get_base_model().named_parameters()
        if weight.grad is not None
    }
    for path, summed in sums.gradient.items():
        ours = np.asarray(summed / sums.targets)
        if "lora_" in path:
            theirs = torch_adapter(gradients, path)
        else:
            _, layer, leaf = path.split(".")
            name = {"linear_0": "linear_1", "linear_2": "linear_2"}[layer]
            suffix = "bias" if leaf == "bias" else "weight"
            (theirs,) = (
                gradient.numpy().T
                for key, gradient in gradients.items()
                if key.endswith(f"multi_modal_projector.{name}.{suffix}")
            )
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, (path, error)

"""Does the converted model compute what PyTorch computes from the checkpoint itself?"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.conversion import keys, peft
from prumerge_jax.conversion.checkpoint_reader import OpenedModel
from prumerge_jax.conversion.hf_files import hf_config
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import LlavaModel, abstract_model, normalize_pixels
from prumerge_jax.store import model_directory as directories

_ROWS = 2
_TEXT = 24  # tokens of text, half of them before the image


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Next-token distributions of two models at every position of a probe.

    Attributes:
      max_difference: largest absolute difference of a logit.
      top1_agreement: share of positions with the same most likely token.
      kl: mean Kullback-Leibler divergence of ours from PyTorch's, in nats.
    """

    max_difference: float
    top1_agreement: float
    kl: float

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"against PyTorch, float32: logits differ by at most {self.max_difference:.2e}, "
            f"top-1 agreement {self.top1_agreement:.2%}, KL {self.kl:.2e}"
        )


def compare_with_torch(model: OpenedModel, directory: pathlib.Path) -> Comparison:
    """Runs a random image and text through PyTorch's LLaVA and through the converted one.

    Both compute in float32 and one after the other, so memory for one float32 model is needed.

    Args:
      model: the checkpoint, opened again from its files.
      directory: what it was converted to.

    Raises:
      ConversionError: torch or transformers is missing, memory is too small, or transformers has
        no such model.
    """
    check_comparable(model.config)
    pixels, ids = _probe(model.config)
    theirs = _torch_logits(model, pixels, ids)
    ours = _our_logits(directory, pixels, ids)
    return compare(ours, theirs)


def check_comparable(config: LlavaConfig) -> None:
    """Checks what `compare_with_torch` needs in addition to weights, before anything is converted.

    Raises:
      ConversionError: torch or transformers is missing, memory is too small, or transformers has
        no such model.
    """
    _import_torch()
    hf_config(dataclasses.replace(config, image_token_id=config.text.vocab_size - 1))
    parameters = sum(int(np.prod(weight.shape)) for weight in keys.weights(config))
    # The float32 model, and one tensor of it twice while it is read.
    needed = 4 * parameters + 12 * config.text.vocab_size * config.text.width
    available = available_memory()
    if needed > available:
        raise ConversionError(
            f"--verify needs {needed / 1e9:.1f} GB of memory for one float32 model, "
            f"{available / 1e9:.1f} GB are available; convert without it"
        )


def available_memory(meminfo: pathlib.Path = pathlib.Path("/proc/meminfo")) -> int:
    """Bytes that can be allocated without swapping.

    Linux's MemAvailable, which counts the page cache that a conversion has just filled; where
    there is none, the free pages.
    """
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compare(ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Compares logits [..., V]."""
    p, q = _log_softmax(theirs), _log_softmax(ours)
    return Comparison(
        max_difference=float(np.abs(ours - theirs).max()),
        top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
    )


def _probe(config: LlavaConfig) -> tuple[np.ndarray, np.ndarray]:
    """uint8 pixels [B, S, S, 3] and ids [B, T], -1 where visual tokens go."""
    rng = np.random.default_rng(0)
    side = config.vision.image_size
    pixels = rng.integers(0, 256, (_ROWS, side, side, 3), np.uint8)
    words = rng.integers(3, config.text.vocab_size // 2, (_ROWS, _TEXT))
    image = np.full((_ROWS, config.vision.num_patches), -1)
    before, after = words[:, : _TEXT // 2], words[:, _TEXT // 2 :]
    return pixels, np.concatenate([before, image, after], axis=1)


def _torch_logits(model: OpenedModel, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    torch, transformers = _import_torch()
    # Any id that the probe's text does not use can stand for the image.
    image_token = model.config.text.vocab_size - 1
    config = hf_config(dataclasses.replace(model.config, image_token_id=image_token))
    tensors = dict(model.tensors)
    if model.adapter is not None:
        tensors = peft.merge_into(tensors, model.adapter)
    oracle = transformers.LlavaForConditionalGeneration._from_config(
        transformers.LlavaConfig(**config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        # This version's own names, whatever they are, say which tensor each parameter wants.
        for name, parameter in oracle.state_dict().items():
            tensor = tensors[keys.canonical_key(name, Dialect.HF)].read()
            parameter.copy_(torch.from_numpy(tensor.astype(np.float32)))
    normalised = np.asarray(normalize_pixels(jnp.asarray(pixels), model.config.vision))
    with torch.no_grad():
        logits = oracle(
            input_ids=torch.from_numpy(np.where(ids < 0, image_token, ids)),
            pixel_values=torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy()),
        ).logits
    return logits.float().numpy()


def _import_torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConversionError(f"--verify needs torch and transformers: {error}") from None
    return torch, transformers


def _our_logits(directory: pathlib.Path, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    config, adapter = config_json.read_config(directory), config_json.read_adapter(directory)
    graphdef, abstract = abstract_model(config, adapter)
    leaves = dict(nnx.to_flat_state(abstract))
    arrays = directories.load_arrays(
        directory,
        {
            ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            for path, leaf in leaves.items()
        },
    )
    state = nnx.from_flat_state(
        {path: leaf.replace(arrays[".".join(map(str, path))]) for path, leaf in leaves.items()}
    )
    return np.asarray(_logits(graphdef, state, jnp.asarray(pixels), jnp.asarray(ids)))


@jax.jit(static_argnames=("graphdef",))
def _logits(
    graphdef: nnx.GraphDef, state: nnx.State, pixels: jax.Array, ids: jax.Array
) -> jax.Array:
    model: LlavaModel = nnx.merge(graphdef, state)
    visual = model.vision(normalize_pixels(pixels, model.vision.config)).hidden[:, 1:]
    is_visual = ids.reshape(-1) < 0
    index = jnp.where(is_visual, jnp.cumsum(is_visual) - 1, -1).reshape(ids.shape)
    x = model.embed_rows(jnp.maximum(ids, 0), visual, index)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.decoder.logits(model.decoder(x, positions, jnp.ones_like(ids)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

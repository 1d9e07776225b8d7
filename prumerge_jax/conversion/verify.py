"""Does the converted model compute what PyTorch computes from the checkpoint itself?"""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.conversion import keys, peft
from prumerge_jax.conversion.checkpoint_reader import OpenedModel
from prumerge_jax.conversion.hf_files import hf_config
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.families import family_of
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
    """Runs random images and text through PyTorch's model and through the converted one.

    A row is text, the features of one image from each tower, a newline where the family has one,
    and text: what every weight but no family's layout of crops takes part in.

    Both compute in float32 and one after the other, so memory for one float32 model is needed.

    Args:
      model: the checkpoint, opened again from its files.
      directory: what it was converted to.

    Raises:
      ConversionError: torch or transformers is missing, memory is too small, or transformers has
        no such model.
    """
    check_comparable(model.config)
    probe = _probe(model.config)
    return compare(ours=_our_logits(directory, probe), theirs=_torch_logits(model, probe))


def check_comparable(config: LlavaConfig) -> None:
    """Checks what `compare_with_torch` needs in addition to weights, before anything is converted.

    Raises:
      ConversionError: torch or transformers is missing, memory is too small, or transformers has
        no such model.
    """
    _import_torch()
    hf_config(_with_any_tokens(config))
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


class _Probe(NamedTuple):
    """uint8 pixels [B, S, S, 3], and ids [B, T] before and after the visual tokens."""

    pixels: Any
    before: Any
    after: Any


def _probe(config: LlavaConfig) -> _Probe:
    rng = np.random.default_rng(0)
    side = config.vision.image_size
    pixels = rng.integers(0, 256, (_ROWS, side, side, 3), np.uint8)
    words = rng.integers(3, config.text.vocab_size // 2, (_ROWS, _TEXT))
    return _Probe(pixels, words[:, : _TEXT // 2], words[:, _TEXT // 2 :])


def _with_any_tokens(config: LlavaConfig) -> LlavaConfig:
    """The same with ids for images and videos, which an original directory does not name."""
    rows = config.text.vocab_size
    video = rows - 2 if family_of(config).video is not None else None
    return dataclasses.replace(config, image_token_id=rows - 1, video_token_id=video)


def _torch_logits(model: OpenedModel, probe: _Probe) -> np.ndarray:
    torch, _ = _import_torch()
    oracle = _torch_model(model)
    inner, config = oracle.model, model.config
    normalised = np.asarray(normalize_pixels(jnp.asarray(probe.pixels), config.vision))
    pixels = torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())
    embed = oracle.get_input_embeddings()
    with torch.no_grad():
        parts = [embed(torch.from_numpy(probe.before))]
        for root in family_of(config).towers.values():
            states = getattr(inner, root)(pixels, output_hidden_states=True).hidden_states
            features = states[config.vision.feature_layer][:, config.vision.num_prefix :]
            parts.append(inner.multi_modal_projector(features))
        if config.image_newline:
            parts.append(inner.image_newline.expand(_ROWS, 1, -1))
        parts.append(embed(torch.from_numpy(probe.after)))
        hidden = inner.language_model(inputs_embeds=torch.cat(parts, dim=1)).last_hidden_state
        return oracle.lm_head(hidden).float().numpy()


def _torch_model(model: OpenedModel) -> Any:
    """transformers' model with the checkpoint's weights, float32."""
    torch, transformers = _import_torch()
    kind = getattr(transformers, family_of(model.config).architecture)
    tensors = dict(model.tensors)
    if model.adapter is not None:
        tensors = peft.merge_into(tensors, model.adapter)
    fields = hf_config(_with_any_tokens(model.config))
    oracle = kind._from_config(kind.config_class(**fields), attn_implementation="eager").eval()
    with torch.no_grad():
        # This version's own names, whatever they are, say which tensor each parameter wants.
        for name, parameter in oracle.state_dict().items():
            key = keys.canonical_key(name, Dialect.HF)
            if key == "lm_head.weight" and model.config.text.tied_head:
                continue
            parameter.copy_(torch.from_numpy(tensors[key].read().astype(np.float32)))
    return oracle


def _import_torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConversionError(f"--verify needs torch and transformers: {error}") from None
    return torch, transformers


def _our_logits(directory: pathlib.Path, probe: _Probe) -> np.ndarray:
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
    return np.asarray(_logits(graphdef, state, probe))


@jax.jit(static_argnames=("graphdef",))
def _logits(graphdef: nnx.GraphDef, state: nnx.State, probe: _Probe) -> jax.Array:
    model: LlavaModel = nnx.merge(graphdef, state)
    config = model.vision.config
    pixels = normalize_pixels(jnp.asarray(probe.pixels), config)
    parts = [model.decoder.embed(probe.before, jnp.float32)]
    for tower in (model.vision, model.video_tower):
        if tower is not None:
            parts.append(model.projector(tower(pixels).hidden[:, config.num_prefix :]))
    if model.image_newline is not None:
        newline = model.image_newline[...]
        parts.append(jnp.broadcast_to(newline, (_ROWS, 1, len(newline))))
    parts.append(model.decoder.embed(probe.after, jnp.float32))
    x = jnp.concatenate(parts, axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return model.decoder.logits(model.decoder(x, positions, jnp.ones_like(positions)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

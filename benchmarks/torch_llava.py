"""transformers' LLaVA in PyTorch, with full tokens: the peer of `scoring.py`."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from prumerge_jax.conversion.hf_files import hf_config
from prumerge_jax.models.config import LlavaConfig

IMAGE_TOKEN = 0  # no text of the benchmark holds it


@dataclasses.dataclass(frozen=True, eq=False)
class TorchLlava:
    """The model and one batch of equal prompts, padding-free.

    Attributes:
      model: `LlavaForConditionalGeneration`, SDPA attention.
      input_ids: [B, N + text], every patch of the image as a placeholder.
      pixels: uint8 [B, 3, S, S].
      mean, std: parameters of the normalisation.
      output_tokens: tokens to generate.
    """

    model: Any
    input_ids: torch.Tensor
    pixels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    output_tokens: int

    @torch.inference_mode()
    def run(self) -> None:
        """Normalises, encodes, prefills and decodes the batch; returns when it is done."""
        pixels = ((self.pixels / 255 - self.mean) / self.std).to(self.model.dtype)
        if self.output_tokens == 1:
            out = self.model(pixel_values=pixels, input_ids=self.input_ids, logits_to_keep=1)
            out.logits.argmax(-1).cpu()
            return
        self.model.generate(
            pixel_values=pixels,
            input_ids=self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            do_sample=False,
            min_new_tokens=self.output_tokens,
            max_new_tokens=self.output_tokens,
        ).cpu()


def random_model(config: LlavaConfig, dtype: str, *, compiled: bool) -> Any:
    """A `LlavaForConditionalGeneration` of this geometry on the GPU if there is one.

    Args:
      config: the geometry.
      dtype: `float32` or `bfloat16`.
      compiled: whether to run the forward pass through `torch.compile`.
    """
    geometry = transformers.LlavaConfig(
        **hf_config(dataclasses.replace(config, image_token_id=IMAGE_TOKEN))
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration._from_config(
            geometry, attn_implementation="sdpa", dtype=getattr(torch, dtype)
        ).eval()
    model.generation_config.eos_token_id = None
    if compiled:
        model.forward = torch.compile(model.forward)
    return model


def batch(
    model: Any,
    config: LlavaConfig,
    images: np.ndarray,
    prompt: np.ndarray,
    output_tokens: int,
) -> TorchLlava:
    """The peer with one prompt for all images.

    Args:
      model: from `random_model`.
      config: its geometry.
      images: uint8 [B, S, S, 3].
      prompt: int32 [text], the ids around the image.
      output_tokens: tokens to generate.
    """
    image = np.full(config.vision.num_patches, IMAGE_TOKEN)
    ids = np.concatenate([prompt[:1], image, prompt[1:]])
    channels = torch.tensor([config.vision.pixel_mean, config.vision.pixel_std])
    mean, std = channels.to(model.device)[:, None, :, None, None]
    return TorchLlava(
        model,
        torch.from_numpy(np.tile(ids, (len(images), 1))).to(model.device),
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(model.device),
        mean,
        std,
        output_tokens,
    )


def best_batch_size(
    model: Any,
    config: LlavaConfig,
    images: np.ndarray,
    prompt: np.ndarray,
    output_tokens: int,
    sizes: Sequence[int],
) -> dict[int, float]:
    """Images per second at each batch size, one warm run each; sizes that do not fit are absent."""
    rates = {}
    for size in sizes:
        peer = batch(model, config, images[:size], prompt, output_tokens)
        try:
            peer.run()
            start = time.perf_counter()
            peer.run()
        except torch.cuda.OutOfMemoryError:
            continue
        rates[size] = size / (time.perf_counter() - start)
    return rates

"""LoRA fine-tuning of Video-LLaVA 7B on images and videos of eight frames.

Batch, rates, rank and row length of Video-LLaVA's scripts/v1_5/finetune_lora.sh on eight devices.
"""

from configs import common


def get_config() -> common.ConfigDict:
    """Adapters on the decoder; the projector trained."""
    config = common.training()
    config.model = common.sizes("video-llava-7b")
    config.learning_rates = (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5))
    config.adapter = common.lora(rank=128)
    config.group_by_modality_length = True
    config.conversation = "v1"
    config.reduction = "prumerge+"
    config.crops_per_sample = 8
    return config

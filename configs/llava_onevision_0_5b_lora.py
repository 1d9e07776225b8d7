"""LoRA fine-tuning of LLaVA-OneVision 0.5B on images, several images and videos.

No script of this kind is published: the rates and the rank are those of LLaVA-1.5's LoRA recipe.
"""

from configs import common


def get_config() -> common.ConfigDict:
    """Adapters on the decoder; projector and newline trained."""
    config = common.training()
    config.model = common.sizes("llava-onevision-0.5b")
    config.learning_rates = (
        ("decoder.*.lora_?", 2e-4),
        ("projector.*", 2e-5),
        ("image_newline", 2e-5),
    )
    config.adapter = common.lora(rank=64, alpha=128)
    config.group_by_modality_length = True
    config.conversation = "qwen_1_5"
    config.reduction = "prumerge+"
    config.crops_per_sample = 32  # the frames of a video; images have 2 to 37 crops
    config.max_length = 8192
    config.batch_size = 64
    return config

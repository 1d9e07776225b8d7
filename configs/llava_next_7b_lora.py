"""LoRA fine-tuning of LLaVA-NeXT 7B (Vicuna) on images cut into tiles, pruned tile by tile.

No script of this kind is published: rates, rank and batch are those of LLaVA-1.5's LoRA recipe.
"""

from configs import common


def get_config() -> common.ConfigDict:
    """Adapters on the decoder; projector and newline trained."""
    config = common.training()
    config.model = common.sizes("llava-next-vicuna-7b")
    config.learning_rates = (
        ("decoder.*.lora_?", 2e-4),
        ("projector.*", 2e-5),
        ("image_newline", 2e-5),
    )
    config.adapter = common.lora(rank=128)
    config.group_by_modality_length = True
    config.conversation = "vicuna_v1"
    config.reduction = "prumerge+"
    config.crops_per_sample = 5  # the largest grids
    config.max_length = 4096  # all that Vicuna takes: five crops at full tokens have 2,928
    return config

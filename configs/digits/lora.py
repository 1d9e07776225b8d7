"""Stage 4 of the miniature: adapters learn to read reduced visual tokens."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """PruMerge's fine-tuning: adapters and projector train, the reduction is on."""
    config = miniature.training()
    config.weights = "runs/digits/finetune/model"
    config.learning_rates = (("decoder.*.lora_?", 2e-3), ("projector.*", 5e-4))
    config.adapter = common.lora(rank=16, alpha=32.0)
    config.reduction = "prumerge:neighbours=8"
    config.position_ids = "original"
    config.data.train_scenes = 14_400
    config.data.questions_per_family = 1
    config.max_length = 376
    config.batch_size = 32
    config.steps = 450
    return miniature.at_scale(config, mode)

"""PruMerge's LoRA fine-tuning of LLaVA-1.5 13B: adaptive visual tokens while training."""

from configs import common, prumerge_7b_lora


def get_config() -> common.ConfigDict:
    """The column of PruMerge's scripts/v1_5/finetune_lora.sh."""
    config = prumerge_7b_lora.get_config()
    config.model = common.sizes("llava-1.5-13b")
    config.batch_size = 192  # 8 x 6 devices x 4 accumulated
    return config

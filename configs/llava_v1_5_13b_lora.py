"""LLaVA-1.5 13B, stage 2 with LoRA on llava_v1_5_mix665k, all visual tokens."""

from configs import common, llava_v1_5_7b_lora


def get_config() -> common.ConfigDict:
    """As the 7B recipe."""
    config = llava_v1_5_7b_lora.get_config()
    config.model = common.sizes("llava-1.5-13b")
    return config

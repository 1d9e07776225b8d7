"""PruMerge's LoRA fine-tuning of LLaVA-1.5 7B on NF4 weights (QLoRA, arXiv 2305.14314)."""

from configs import common, prumerge_7b_lora


def get_config() -> common.ConfigDict:
    """`prumerge_7b_lora` with the frozen layers in NF4; adapters and projector are float32."""
    config = prumerge_7b_lora.get_config()
    config.quantize = "nf4"
    return config

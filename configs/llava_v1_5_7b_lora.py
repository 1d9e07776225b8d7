"""LLaVA-1.5 7B, stage 2 with LoRA on llava_v1_5_mix665k, all visual tokens."""

from configs import common


def get_config() -> common.ConfigDict:
    """The column `finetune_lora` of LLaVA's scripts/v1_5/finetune_lora.sh."""
    config = common.training()
    config.model = common.sizes("llava-1.5-7b")
    config.learning_rates = (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5))
    config.adapter = common.lora(rank=128)
    config.group_by_modality_length = True
    config.tokenizer_style = "4.37"
    config.label_protocol = "llava-1.2"
    config.batch_size = 128  # 16 x 8 devices
    return config

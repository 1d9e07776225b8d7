"""PruMerge's LoRA fine-tuning of LLaVA-1.5 7B: adaptive visual tokens while training."""

from configs import common


def get_config() -> common.ConfigDict:
    """The column of PruMerge's scripts/v1_5/finetune_lora_7b.sh.

    The reference trains with a fixed ratio above batch 1 (`prumerge+fixed`); here the adaptive
    reduction that it evaluates with is trained.
    """
    config = common.training()
    config.model = common.sizes("llava-1.5-7b")
    config.learning_rates = (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5))
    config.adapter = common.lora(rank=128)
    config.group_by_modality_length = True
    config.reduction = "prumerge"
    config.batch_size = 160  # 20 x 4 devices x 2 accumulated
    return config

"""The stages of the miniature, in order: contrastive, align, finetune, lora."""

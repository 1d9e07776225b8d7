"""The stages of the miniature, in their order: contrastive, language, align, finetune, lora."""

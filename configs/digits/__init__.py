"""The stages of the miniature, in their order: contrastive, align, finetune, lora; an ablation."""

"""LoRA of any converted model on your own data in LLaVA's form, by flags alone.

    python train.py --config configs/lora.py --workdir runs/lora --config.weights=DIR
        --config.data.json_file=FILE --config.data.image_folder=DIR

Sizes come from the model directory. Common flags: `--config.reduction=prumerge`,
`--config.batch_size=16`, `--config.epochs=3`, `--config.adapter.rank=64`,
`--config.data.skip_bad_images=true`; on a CPU also `--config.dtype=float32`.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config() -> common.ConfigDict:
    """LLaVA-1.5's LoRA settings, with a batch that a single host can hold."""
    config = common.training()
    config.learning_rates = (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5))
    config.adapter = common.lora(rank=128)
    config.max_length = placeholder(int)  # None: the model's positions, at most 2048
    config.batch_size = 16
    return config

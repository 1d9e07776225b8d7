"""What the stages of the miniature share: sizes and data. Not a stage itself."""

import prumerge_jax.digits.training  # noqa: F401, registers data set, tokenizer and objective
from configs import common
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig

MODEL = LlavaConfig(
    vision=VisionConfig(
        image_size=96, patch_size=8, width=64, mlp_width=256, num_layers=4, num_heads=2,
        activation="gelu", pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    ),
    text=TextConfig(
        vocab_size=384, width=96, mlp_width=256, num_layers=3, num_heads=3, num_kv_heads=3,
        head_dim=32, max_positions=1024,
    ),
    image_token_id=None,
    pad_token_id=None,
)  # fmt: skip


def training() -> common.ConfigDict:
    """A stage of the miniature: float32 on one device, data in `data.form`."""
    config = common.training()
    config.model = common.sizes(MODEL)
    config.tokenizer = "digits"
    config.data.name = "digits_vqa"
    config.data.form = "conversation"
    config.data.train_scenes = 32_000
    config.data.validation_scenes = 500
    config.data.test_scenes = 1_000
    config.data.questions_per_family = 2
    config.data.scenes_per_layout = 8
    config.data.seed = 0
    config.max_length = 320
    config.batch_size = 64
    config.dtype = "float32"
    config.remat = "none"
    config.run.rows_per_shard = 16
    config.seed = 0
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.98
    config.optimizer.warmup_ratio = 0.05
    config.run.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.run.num_workers = 0
    config.run.keep = 1
    return config


def at_scale(config: common.ConfigDict, mode: str) -> common.ConfigDict:
    """The stage itself; in mode `tiny` (`--config configs/digits/lora.py:tiny`) four small steps.

    Raises:
      ValueError: another mode.
    """
    if mode not in ("", "tiny"):
        raise ValueError(f"mode is {mode!r}; expected none or 'tiny'")
    if mode == "tiny":
        config.weights = "random"
        config.data.train_scenes = 64
        config.data.validation_scenes = config.data.test_scenes = 8
        config.batch_size = 32
        config.steps = 4
        config.run.save_every = 2
        config.run.log_every = 1
    return config

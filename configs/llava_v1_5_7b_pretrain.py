"""LLaVA-1.5 7B, stage 1: aligns the projector on blip_laion_cc_sbu_558k."""

from configs import common


def get_config() -> common.ConfigDict:
    """The column `pretrain` of LLaVA's scripts/v1_5/pretrain.sh."""
    config = common.training()
    config.model = common.sizes("llava-1.5-7b")
    config.learning_rates = (("projector.*", 1e-3),)
    config.conversation = "plain"
    config.image_mode = "crop"
    config.batch_size = 256  # 32 x 8 devices
    return config

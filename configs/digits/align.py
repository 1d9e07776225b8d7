"""Stage 3 of the miniature: the projector learns to describe pictures to the decoder."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """LLaVA's stage 1: captions in the template `plain`, the projector alone trains."""
    config = miniature.training()
    config.weights = "runs/digits/language/model"
    config.learning_rates = (("projector.*", 4e-3),)
    config.data.form = "caption"
    config.conversation = "plain"
    config.max_length = 168
    config.batch_size = 32
    config.steps = 200
    return miniature.at_scale(config, mode)

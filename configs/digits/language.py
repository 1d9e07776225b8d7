"""Stage 2 of the miniature: the decoder learns what the questions mean, from text alone."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """The caption stands in the picture's place."""
    config = miniature.training()
    config.weights = "runs/digits/contrastive/model"
    config.learning_rates = (("decoder.*", 3e-3),)
    config.data.form = "text"
    config.reduction = None
    config.max_length = 168
    config.batch_size = 32
    config.steps = 800
    return miniature.at_scale(config, mode)

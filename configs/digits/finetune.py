"""Stage 3 of the miniature: projector and decoder on questions, all visual tokens."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """LLaVA's stage 2."""
    config = miniature.training()
    config.weights = "runs/digits/align/model"
    config.learning_rates = (("decoder.*", 1e-3), ("projector.*", 1e-3))
    config.max_length = 464
    config.batch_size = 16
    config.steps = 2500
    return miniature.at_scale(config, mode)

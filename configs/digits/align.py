"""Stage 2 of the miniature: projector and decoder learn to describe images."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """LLaVA's stage 1, captions in the template `plain`; with no decoder yet, it trains too.

    A caption names every place before its digit, so each digit is looked up in one step of
    attention. From questions alone a decoder this small takes far longer to find out how.
    """
    config = miniature.training()
    config.weights = "runs/digits/contrastive/model"
    config.learning_rates = (("decoder.*", 1e-3), ("projector.*", 1e-3))
    config.data.form = "caption"
    config.conversation = "plain"
    config.max_length = 168
    config.batch_size = 16
    config.steps = 1200
    return miniature.at_scale(config, mode)

"""An ablation of the miniature: the decoder learns the questions from text before any picture."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """The caption stands in the picture's place; `align.py` goes on from the model it leaves.

    The shipped miniature does without. Looking a digit up in a text takes two steps of attention,
    in visual tokens one. A decoder that starts with text learns to guess among the digits that it
    sees, and is slow to leave that habit in fine-tuning.
    """
    config = miniature.training()
    config.weights = "runs/digits/contrastive/model"
    config.learning_rates = (("decoder.*", 1e-3),)
    config.data.form = "text"
    config.reduction = None
    config.max_length = 336
    config.batch_size = 16
    config.steps = 400
    return miniature.at_scale(config, mode)

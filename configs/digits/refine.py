"""An ablation of the miniature: the questions again, with parts of every second picture."""

from configs import common
from configs.digits import finetune


def get_config(mode: str = "") -> common.ConfigDict:
    """Fine-tuning goes on with patch dropout: answers stop leaning on patches without a digit.

    The shipped miniature does without.
    """
    config = finetune.get_config(mode)
    if mode != "tiny":
        config.weights = "runs/digits/finetune/model"
    config.patch_dropout = {"pictures": 0.5, "least": 0.12}
    return config

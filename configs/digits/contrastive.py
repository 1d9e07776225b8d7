"""Stage 1 of the miniature: a vision tower whose CLS attention finds the digits."""

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """InfoNCE over scenes of one layout, from single cells to full images."""
    config = miniature.training()
    config.objective = "contrastive"
    config.weights = "random"
    config.learning_rates = (("*", 2e-3),)
    config.batch_size = 64
    config.steps = 4500
    config.optimizer.weight_decay = 0.05
    config.objective_options = common.ConfigDict(
        {
            "group": 8,
            "width": 64,
            "temperature": 0.07,
            "cls_attention_gain": 2.0,  # see contrastive.scale_cls_queries
            # side of the window in cells, share of the steps, windows per scene
            "curriculum": ((1, 0.35, 4), (2, 0.3, 1), (3, 0.35, 1)),
            "text": {
                "width": 64,
                "mlp_width": 128,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 2,
                "head_dim": 32,
                "max_positions": 20,
            },
        }
    )
    return miniature.at_scale(config, mode)

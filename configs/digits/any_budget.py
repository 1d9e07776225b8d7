"""Stage 4 of the miniature: one adapter that reads any number of visual tokens."""

from ml_collections.config_dict import placeholder

from configs import common
from configs.digits import miniature


def get_config(mode: str = "") -> common.ConfigDict:
    """Random counts; with a `weight` above 0 also distillation from the model that the run starts
    from, at all tokens.

    Nothing but adapters trains, so without them the model is the same teacher at every step.
    """
    config = miniature.training()
    config.objective = "any_budget"
    config.objective_options = common.ConfigDict(
        {
            "lower": (36, 14),
            "falling": 0.4,
            "weight": 0.0,  # a teacher costs as much again, and brings nothing that shows
            "temperature": 2.0,
            "teacher": "adapters_off",
            "teacher_factor": placeholder(float),  # None: all patches
            "teacher_length": 480,
        }
    )
    config.weights = "runs/digits/finetune/model"
    config.learning_rates = (("decoder.*.lora_?", 2e-3),)
    config.adapter = common.lora(rank=16, alpha=32.0, dropout=0.0)
    config.reduction = "top:tokens=144,merge=mean"
    config.position_ids = "original"
    config.data.train_scenes = 14_400
    config.data.questions_per_family = 1
    config.max_length = 320
    config.batch_size = 32
    config.steps = 1300
    config.run.rows_per_shard = 6
    return miniature.at_scale(config, mode)

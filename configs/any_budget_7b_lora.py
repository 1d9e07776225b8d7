"""LLaVA-1.5 7B, stage 2 with LoRA: one adapter for every number of visual tokens."""

from configs import common, prumerge_7b_lora


def get_config() -> common.ConfigDict:
    """PruMerge's fine-tuning, with random counts of `cover` and EPIC's token distillation.

    The weight, the temperature and a teacher of the same weights are EPIC's (arXiv 2510.00515);
    counts and schedule are ours. From a finished LLaVA-1.5 the teacher may be what the run started
    from: `teacher="adapters_off"`, `teacher_factor=None`, and adapters alone in `learning_rates`.
    """
    config = prumerge_7b_lora.get_config()
    config.objective = "any_budget"
    config.objective_options = common.ConfigDict(
        {
            "lower": (288, 32),  # smallest count, at first and at last
            "falling": 0.6,  # share of the steps
            "weight": 0.5,  # of the teacher; 0 is the ablation
            "temperature": 2.0,
            "teacher": "current",
            "teacher_factor": 2.0,
            "teacher_length": 2816,
        }
    )
    config.reduction = "cover:tokens=288,alpha=1,block=8"
    config.batch_size = 128
    return config

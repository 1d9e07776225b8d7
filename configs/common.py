"""Every field of a training configuration, and what all published recipes have in common."""

import dataclasses

import ml_collections

from prumerge_jax.models.config import LlavaConfig, published

ConfigDict = ml_collections.ConfigDict


def training() -> ConfigDict:
    """All fields, with the settings that LLaVA-1.5 and PruMerge share; not yet a recipe."""
    config = ConfigDict()
    config.objective = "next_token"  # or "contrastive"
    config.model = ConfigDict()  # sizes
    config.weights = ml_collections.config_dict.placeholder(str)  # model directory to start from
    config.learning_rates = ()  # (path pattern, rate); what is not named is frozen
    config.adapter = None  # rank, alpha, dropout
    config.contrastive = None  # parts of that stage

    config.data = ConfigDict()
    config.conversation = "v1"
    config.tokenizer_style = "4.31"
    config.label_protocol = "prumerge"
    config.image_mode = "pad"
    config.group_by_modality_length = False

    config.reduction = "full"  # as prumerge:neighbours=8, see reductions/; None: no images at all
    config.patch_dropout = None  # pictures, least: see training/patch_dropout.py
    config.position_ids = "compact"
    config.max_length = 2048

    config.batch_size = 128  # samples of an optimizer step, over all devices
    config.epochs = 1.0
    config.steps = ml_collections.config_dict.placeholder(int)  # where given, instead of epochs
    config.optimizer = ConfigDict(
        {
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            # DeepSpeed's files set none, so the published runs were most likely not clipped.
            "clip_norm": ml_collections.config_dict.placeholder(float),
        }
    )
    config.dtype = "bfloat16"
    config.remat = "full"
    config.seed = 42

    # How it is executed; may change when a run is resumed.
    config.run = ConfigDict(
        {
            "mesh": {"data": 0, "fsdp": 0, "tensor": 1},  # 0: the devices that remain
            "rows_per_shard": 1,  # of a micro-batch; more take more memory, and want filling
            "num_threads": 2,
            "num_workers": 4,
            "log_every": 10,
            "save_every": 200,
            "keep": 2,
            "verify_weights": True,
        }
    )
    return config


def sizes(model: str | LlavaConfig) -> ConfigDict:
    """The sizes of a model as configuration fields."""
    config = published(model) if isinstance(model, str) else model
    return ConfigDict(dataclasses.asdict(config))


def llava_json() -> ConfigDict:
    """A fine-tuning file in LLaVA's form; its three paths are given on the command line."""
    return ConfigDict(
        {
            "name": "llava_json",
            "json_file": "",
            "image_folder": "",
            "directory": "~/.cache/prumerge_jax",  # where the prepared records go
        }
    )

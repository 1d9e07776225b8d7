"""Every field of a training configuration, and what all published recipes have in common."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from prumerge_jax.families import published
from prumerge_jax.models.config import LlavaConfig


def training() -> ConfigDict:
    """All fields, with the settings that LLaVA-1.5 and PruMerge share; not yet a recipe."""
    config = ConfigDict()
    config.objective = "next_token"
    config.objective_options = ConfigDict()  # fields that only this objective has
    config.model = ConfigDict()  # sizes; empty: those of the weights
    config.weights = placeholder(str)  # model directory, or "miniature", or "random"
    config.tokenizer = placeholder(str)  # for random weights alone: a tokenizer.model
    config.learning_rates = ()  # (path pattern, rate); what is not named is frozen
    config.adapter = lora(rank=0)  # no adapters

    config.data = llava_json()
    config.conversation = "v1"
    config.tokenizer_style = "4.31"
    config.label_protocol = "prumerge"
    config.image_mode = "pad"
    config.crops_per_sample = placeholder(int)  # room for tiles and frames, mean over a batch
    config.group_by_modality_length = False

    config.reduction = "full"  # as prumerge:neighbours=8, see reductions/
    config.position_ids = "compact"
    config.max_length = 2048

    config.batch_size = 128  # samples of an optimizer step, over all devices
    config.epochs = 1.0
    config.steps = placeholder(int)  # where given, instead of epochs
    config.optimizer = ConfigDict(
        {
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            # DeepSpeed's files set none, so the published runs were most likely not clipped.
            "clip_norm": placeholder(float),
        }
    )
    config.dtype = "bfloat16"
    config.quantize = placeholder(str)  # nf4, int8 or int4: of the frozen layers; QLoRA
    config.remat = "auto"  # what fits; or none, dots, wide, full: from most memory to least
    config.seed = 42

    # How it is executed; may change when a run is resumed.
    config.run = ConfigDict(
        {
            "mesh": {"data": 0, "fsdp": 0, "tensor": 1},  # 0: the devices that remain
            "rows_per_shard": 0,  # of a micro-batch; 0: what suits the devices
            "frozen": "auto",  # weights that do not train: sharded or replicated, as suits
            "xla_options": True,  # those that a TPU needs, above all to overlap gathers
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


def lora(rank: int, alpha: float = 256.0, dropout: float = 0.05) -> ConfigDict:
    """Adapters on every linear layer of the decoder; a rank of 0 means none."""
    return ConfigDict({"rank": rank, "alpha": alpha, "dropout": dropout})


def llava_json() -> ConfigDict:
    """A fine-tuning file in LLaVA's form; its paths are given on the command line."""
    return ConfigDict(
        {
            "name": "llava_json",
            "json_file": "",
            "image_folder": "",
            "directory": "~/.cache/prumerge_jax",  # where prepared records are stored
            "skip_bad_images": False,  # leave such samples out instead of refusing all
        }
    )

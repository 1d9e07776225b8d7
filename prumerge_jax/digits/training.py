"""What the digits add to training: a data set, a tokenizer and the contrastive objective.

Importing this module registers them; the recipes in `configs/digits` and `train.py` do.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prumerge_jax.data import samples
from prumerge_jax.data.datasets import (
    DataConfig,
    Records,
    exclusive,
    register_dataset,
)
from prumerge_jax.data.images import OneOfSeveral, Shown
from prumerge_jax.data.samples import Sample
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.digits.captions import CaptionPacker, Curriculum, open_windows
from prumerge_jax.digits.contrastive import (
    CaptionBatch,
    ContrastiveConfig,
    contrastive_loss,
    contrastive_module,
    scale_cls_queries,
)
from prumerge_jax.digits.dataset import DigitsVqa, DigitsVqaConfig, caption_sample
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import TextConfig
from prumerge_jax.training.config import ConfigError, TrainConfig
from prumerge_jax.training.inputs import TrainingSource
from prumerge_jax.training.objectives.registry import Objective, Packer, register_objective
from prumerge_jax.training.weights import Weights, register_tokenizer, trained_paths

_SIZES = (
    "train_scenes", "validation_scenes", "test_scenes", "questions_per_family",
    "scenes_per_layout", "seed",
)  # fmt: skip
# What a record becomes, by `data.form`.
_FORMS: Mapping[str, Callable[[Mapping[str, Any]], Sample]] = {
    "conversation": samples.from_record,
    "caption": caption_sample,
}


class _DigitsDataset:
    """`Dataset` of digit scenes, which are drawn on first use."""

    def __init__(self, data: DataConfig) -> None:
        options = data.options
        for name in _SIZES:
            if not isinstance(options.get(name), int) or options[name] < (name != "seed"):
                raise ConfigError(
                    f"config.data.{name} is {quoted(options.get(name))}; expected a positive "
                    "integer"
                )
        form = options.get("form", "conversation")
        if form not in _FORMS:
            raise ConfigError(
                f"config.data.form is {quoted(form)}; expected one of {sorted(_FORMS)}"
            )
        self._to_sample = _FORMS[form]
        self._config = DigitsVqaConfig(**{name: options[name] for name in _SIZES})
        self._directory = pathlib.Path(data.directory).expanduser()
        self.identity = f"digits_vqa/{DigitsVqa.VERSION}/{self._config.name}/{form}"
        self.samples = self._config.train_scenes

    def records(self) -> Records:
        with exclusive(self._directory):
            builder = samples.prepare(DigitsVqa, self._config, self._directory)
        source = samples.record_source(builder, "train")
        everyone = np.ones(len(source), bool)
        return Records(source, everyone, np.arange(len(source)), self._to_sample)

    def conversations(self) -> Iterator[Sample]:
        return (self._to_sample(record) for record in self.records().source)

    def shown(self) -> Iterator[tuple[Shown | OneOfSeveral, ...]]:
        return map(samples.shown, self.conversations())


def _contrastive(config: TrainConfig) -> Objective:
    model, options = config.sizes, dict(config.objective_options)
    if config.dtype != "float32":
        raise ConfigError(
            f"the contrastive objective computes in float32, not in {quoted(config.dtype)}"
        )
    if config.data.name != "digits_vqa":
        raise ConfigError(
            f"the contrastive objective is for data.name 'digits_vqa', not "
            f"{quoted(config.data.name)}; to train on your own data use configs/lora.py"
        )
    try:
        text = TextConfig(**options["text"], vocab_size=model.text.vocab_size)
        parts = ContrastiveConfig(text, options["width"], options["group"], options["temperature"])
        curriculum = Curriculum(parts.group, tuple(map(tuple, options["curriculum"])))
        gain = float(options["cls_attention_gain"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.objective_options do not describe the contrastive objective: {error!r}"
        ) from None
    module = contrastive_module(model.vision, parts)

    def loss(weights: Weights, batch: CaptionBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return contrastive_loss(weights, batch, vision=model.vision, config=parts)

    def open_source(tokenizer: Tokenizer) -> TrainingSource:
        return open_windows(config, tokenizer, model.vision, curriculum)

    def packer(tokenizer: Tokenizer, frozen: Weights, mesh: Mesh, total_steps: int) -> Packer:
        return CaptionPacker(tokenizer, max_length=text.max_positions, mesh=mesh)

    return Objective(
        module,
        loss,
        trained_paths(module.variables, config.learning_rates),
        jnp.dtype(jnp.float32),
        open_source,
        packer,
        functools.partial(scale_cls_queries, cls_attention_gain=gain),
    )


register_dataset("digits_vqa", _DigitsDataset, (*_SIZES, "form"))
register_tokenizer("digits", digits_tokenizer.build_for_digits)
register_objective("contrastive", _contrastive)

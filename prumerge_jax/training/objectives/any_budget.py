"""One adapter for every budget: a random number of visual tokens per sample, a teacher with more.

Token consistency distillation (EPIC, arXiv 2510.00515) with packed rows: the loss of a sample is
(1 - w) cross entropy + w T^2 KL(teacher || student), summed over the positions that predict an
answer. Counts instead of shares, per sample instead of per step; the positions are those that
predict the targets, where the published trainer takes the ones behind.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import reductions
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.models.llava import LlavaModel, gather_evidence
from prumerge_jax.models.vision_tower import VisionTower
from prumerge_jax.sharding.mesh import logical_spec
from prumerge_jax.training.config import ConfigError, TrainConfig, objective_options
from prumerge_jax.training.inputs import TrainingSource, in_order, open_conversations
from prumerge_jax.training.objectives.next_token import (
    ImageEncoder,
    check_row_length,
    cross_entropy,
    hidden_states,
    logits_of,
    next_token_loss,
    row_shape,
    run_reduction,
    sum_over_targets,
)
from prumerge_jax.training.objectives.registry import Objective, Packer
from prumerge_jax.training.pairs import (
    Budgets,
    Merge,
    PairBatch,
    PairPacker,
    RankedTokens,
    TeacherShape,
)
from prumerge_jax.training.weights import Weights, llava_module, trained_paths


@dataclasses.dataclass(frozen=True)
class AnyBudget:
    """The fields of `config.objective_options`; the largest count is the reduction's `tokens`.

    Attributes:
      lower: smallest count that is drawn at the first step, and once it has fallen.
      falling: share of the steps over which it falls.
      weight: of the teacher's part of the loss; 0 trains with random counts alone.
      temperature: that both distributions are softened with.
      teacher: `current` are the weights of the step, `adapters_off` the same without adapters: what
        the run started from, where nothing but adapters trains.
      teacher_factor: visual tokens of the teacher per one of the student; None gives it all.
      teacher_length: tokens per row of the teacher; None is `max_length`.
    """

    lower: tuple[int, int] = (288, 32)
    falling: float = 0.6
    weight: float = 0.5
    temperature: float = 2.0
    teacher: Literal["current", "adapters_off"] = "current"
    teacher_factor: float | None = 2.0
    teacher_length: int | None = None

    def __post_init__(self) -> None:
        first, last = self.lower
        if not 1 <= last <= first:
            raise ValueError(f"lower is {self.lower}; expected falling counts of at least 1")
        if not 0 <= self.falling <= 1:
            raise ValueError(f"falling is {self.falling}; expected a share, 0 to 1")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; expected 0 to 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")
        if self.teacher_factor is not None and not (
            self.teacher_factor >= 1 and math.isfinite(self.teacher_factor)
        ):
            raise ValueError(
                f"teacher_factor is {self.teacher_factor}; expected at least 1, or None for all"
            )


def any_budget_loss(
    student: LlavaModel,
    teacher: LlavaModel | None,
    batch: PairBatch,
    *,
    weight: float,
    temperature: float,
    dropout_key: jax.Array | None,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """The loss, summed over the target tokens, and their number; both float32.

    Args:
      student: its tower is not run.
      teacher: gets no gradient and no dropout; None where `batch` has none, which leaves
        `next_token_loss`.
      batch: packed rows.
      weight, temperature: see `AnyBudget`.
      dropout_key, remat: as in `next_token_loss`.
    """
    if teacher is None or batch.teacher is None or batch.teacher_at is None:
        return next_token_loss(student, batch.student, dropout_key=dropout_key, remat=remat)
    taught = hidden_states(teacher, batch.teacher, dropout_key=None, remat="none")
    taught = jnp.take_along_axis(taught, batch.teacher_at[..., None], axis=1)
    taught = jax.lax.stop_gradient(taught)
    hidden = hidden_states(student, batch.student, dropout_key=dropout_key, remat=remat)

    own_logits, its_logits = (logits_of(each.decoder, hidden.dtype) for each in (student, teacher))

    def loss(targets: jax.Array, hidden: jax.Array, taught: jax.Array) -> jax.Array:
        own = own_logits(hidden)
        expected = jax.lax.stop_gradient(its_logits(taught))
        distilled = divergence(own, expected, temperature)
        return (1 - weight) * cross_entropy(own, targets) + weight * distilled

    return sum_over_targets(loss, batch.student.targets, hidden, taught)


def divergence(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [..., V], in nats, [...]."""
    ours = jax.nn.log_softmax(student / temperature)
    theirs = jax.nn.log_softmax(teacher / temperature)
    return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)


def make(config: TrainConfig) -> Objective:
    """The objective of a LLaVA.

    Raises:
      ConfigError: the fields contradict each other, the model or its images.
    """
    options, rule = objective_options(AnyBudget, config), _set_rule(config)
    model, num_patches = config.sizes, config.sizes.vision.num_patches
    most = rule.capacity_for(num_patches)
    shape = None
    if options.weight:
        shape = TeacherShape(options.teacher_factor, options.teacher_length or config.row_length)
    _check(config, options, most, shape)
    module = llava_module(model, config.adapter, config.quantize)
    without_adapters = llava_module(model, None, config.quantize)

    def loss(weights: Weights, batch: PairBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        teacher = None
        if shape is not None:
            source = module if options.teacher == "current" else without_adapters
            teacher = source.merge(jax.lax.stop_gradient(weights))
        return any_budget_loss(
            module.merge(weights),
            teacher,
            batch,
            weight=options.weight,
            temperature=options.temperature,
            dropout_key=key,
            remat=config.remat,
        )

    def open_source(tokenizer: Tokenizer) -> TrainingSource:
        # A sample's counts are drawn by its place, which no mesh may change.
        return in_order(open_conversations(config, tokenizer, options.lower[1]))

    def packer(tokenizer: Tokenizer, frozen: Weights, mesh: Mesh, total_steps: int) -> Packer:
        ranked = most
        # A teacher that sees all patches as they are needs no order.
        if shape is not None and (shape.factor is not None or rule.merge != "none"):
            ranked = shape.most(most, num_patches)
        return PairPacker(
            ranking_encoder(config, frozen, mesh, ranked),
            merge=None if rule.merge == "none" else merger(rule, mesh),
            budgets=Budgets(
                options.lower, most, options.falling, total_steps * config.batch_size, config.seed
            ),
            teacher=shape,
            num_patches=num_patches,
            shape=row_shape(config, mesh),
            mesh=mesh,
        )

    rates = trained_paths(module.variables, config.learning_rates)
    return Objective(module, loss, rates, jnp.dtype(config.dtype), open_source, packer)


def ranking_encoder(config: TrainConfig, weights: Weights, mesh: Mesh, steps: int) -> ImageEncoder:
    """The tower and the first `steps` patches of the reduction's order, as `RankedTokens`."""
    rule, dtype = _set_rule(config), jnp.dtype(config.dtype)

    def encode(vision: VisionTower, pixels: jax.Array) -> RankedTokens:
        evidence = gather_evidence(vision, pixels, rule, dtype=dtype)
        ranking = rule.rank(evidence, steps)
        return RankedTokens(ranking.evidence.hidden, ranking.order.patches, ranking.available)

    return ImageEncoder(config, weights, mesh, encode)


def merger(rule: reductions.SetRule, mesh: Mesh) -> Merge:
    """What makes the tokens of a rule that merges; see `PairPacker`."""

    def merge(ranked: RankedTokens, counts: tuple[jax.Array, ...]) -> jax.Array:
        everywhere = jnp.ones(ranked.tokens.shape[:2], bool)
        versions = [rule.first(ranked.tokens, ranked.order, each, everywhere) for each in counts]
        return jnp.concatenate([version.tokens for version in versions], axis=1)

    return jax.jit(merge, out_shardings=NamedSharding(mesh, logical_spec("batch")))


def _set_rule(config: TrainConfig) -> reductions.SetRule:
    """The rule that ranks the patches.

    Raises:
      ConfigError: the reduction has no order that serves every budget.
    """
    rule = run_reduction(config)
    if not isinstance(rule, reductions.SetRule) or rule.varying:
        raise ConfigError(
            f"reduction is {config.reduction!r}, which does not choose patches one by one up to a "
            "fixed count; expected one such as cover:tokens=288"
        )
    return rule


def _check(
    config: TrainConfig, options: AnyBudget, most: int, teacher: TeacherShape | None
) -> None:
    name = "config.objective_options"
    if config.shows_crops:
        raise ConfigError(
            "objective is 'any_budget', which draws one count for each image, and images of family "
            f"{config.sizes.family!r} have several crops; set config.objective=next_token"
        )
    check_row_length(config, most)
    if options.lower[0] > most:
        raise ConfigError(
            f"{name}.lower is {options.lower}; expected at most the tokens of the reduction "
            f"{config.reduction!r}, {most}"
        )
    if options.teacher == "adapters_off" and config.adapter is None:
        raise ConfigError(
            f"{name}.teacher is 'adapters_off', but the run has no adapters; expected 'current', "
            "or an adapter.rank"
        )
    if teacher is None:
        return
    needed = teacher.most(most, config.sizes.vision.num_patches)
    positions = config.sizes.text.max_positions
    if not max(needed + 1, config.row_length) <= teacher.length <= positions:
        raise ConfigError(
            f"{name}.teacher_length is {teacher.length}; expected at least max_length "
            f"{config.row_length}, more than the teacher's {needed} visual tokens, and at most "
            f"the model's {positions} positions"
        )

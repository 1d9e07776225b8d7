"""What an evaluation will run, all of it checked before the model is loaded."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prumerge_jax import reductions, sharding
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.pictures import PictureProcessor, default_mode
from prumerge_jax.evaluation import runner, shares
from prumerge_jax.evaluation.answers import Fingerprint
from prumerge_jax.evaluation.config import Decoding, EvalConfig, TaskConfig
from prumerge_jax.evaluation.journal import check_same_run
from prumerge_jax.evaluation.questions import Task, TaskQuestions
from prumerge_jax.families import FAMILIES, family_of
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import Format
from prumerge_jax.models.quantised_weights import chosen_format
from prumerge_jax.reductions import Reduction
from prumerge_jax.sharding.agreement import is_leader
from prumerge_jax.store.manifest import read_manifest, weights_identity

_VIDEO_MODELS = " or ".join(family.title for family in FAMILIES.values() if family.video)


@dataclasses.dataclass(frozen=True)
class Run:
    """One benchmark with one reduction.

    Attributes:
      questions: the benchmark's questions.
      name: the reduction as it was spelled.
      reduction: what happens to the visual tokens.
      decoding: how answers are made.
      fingerprint: all that determines the answers.
      folder: where they are stored.
    """

    questions: TaskQuestions
    name: str
    reduction: Reduction
    decoding: Decoding
    fingerprint: Fingerprint
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of an evaluation, and the model that answers.

    Attributes:
      config: what was asked for.
      workdir: folder of the evaluation.
      checkpoint: the model's directory.
      model: its sizes.
      dtype: compute dtype.
      quantize: format of the decoder's kernels, None for none.
      mesh: its devices, all of this process; None is the first one.
      weights: hash of its weights.
      questions: one entry per benchmark.
      runs: by benchmark, then by reduction. Baselines join when their token counts are known.
    """

    config: EvalConfig
    workdir: pathlib.Path
    checkpoint: pathlib.Path
    model: LlavaConfig
    dtype: jnp.dtype
    quantize: Format | None
    mesh: Mesh | None
    weights: str
    questions: tuple[TaskQuestions, ...]
    runs: tuple[Run, ...] = ()

    def run(self, questions: TaskQuestions, name: str) -> Run:
        """The run of one benchmark with the reduction of that name."""
        reduction = reductions.parse(name)
        decoding = self.config.decoding_for(questions.task.benchmark)
        is_single = len(self.questions) == 1 and len(self.config.reductions) == 1
        folder = self.workdir
        if not is_single or self.config.baselines:
            folder = folder / questions.task.benchmark.name / re.sub(r"[^\w+.=-]", "_", name)
        computed = str(self.dtype)
        if self.quantize is not None:
            computed += f", {self.quantize.name} kernels"
        if self.config.cache_dtype is not None:
            computed += f", {self.config.cache_dtype} cache"
        fingerprint = runner.fingerprint(
            self.weights, computed, questions.task, reduction, decoding
        )
        return Run(questions, name, reduction, decoding, fingerprint, folder)


def plan_runs(config: EvalConfig, workdir: pathlib.Path) -> Plan:
    """Reads and checks everything but the weights, then makes the workdir.

    Only questions that a benchmark makes itself are written to it.

    Raises:
      ValueError: a file that the configuration names is malformed or does not fit another, or a
        value does not fit the model or the devices; the message says which.
      OSError: a file is missing.
    """
    if not config.checkpoint:
        raise ValueError(
            "no model to score: pass --config.checkpoint=DIR, or --config.answers=FILE"
        )
    given = {
        task.benchmark.name: read_questions(task, with_images=True)
        for task in config.tasks
        if task.files is not None
    }
    checkpoint = model_directory(config.checkpoint)
    model = config_json.read_config(checkpoint)
    vision = model.vision
    for name in config.reductions:  # one that resizes images may ask for more than there is
        reduction = reductions.parse(name)
        side = reduction.image_size(vision.image_size, vision.patch_size)
        try:
            PictureProcessor(model, side, default_mode(model))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        reduction.drops(model.text.num_layers)
    for task in config.tasks:
        if task.benchmark.shows_videos and family_of(model).video is None:
            raise ValueError(
                f"{task.benchmark.name} asks about videos, and {family_of(model).title} takes "
                f"images alone; expected a model such as {_VIDEO_MODELS}"
            )
        _check_limit(config.decoding_for(task.benchmark), task, model)
    mesh = _own_mesh(config.mesh)
    dtype = config.dtype or read_manifest(checkpoint).arrays["decoder.embed_tokens"].dtype
    workdir.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        config=config,
        workdir=workdir,
        checkpoint=checkpoint,
        model=model,
        dtype=jnp.dtype(dtype),
        quantize=chosen_format(checkpoint, config.quantize),
        mesh=mesh,
        weights=weights_identity(checkpoint),
        questions=tuple(
            given.get(task.benchmark.name) or _own_questions(task, workdir) for task in config.tasks
        ),
    )
    runs = [plan.run(task, name) for task in plan.questions for name in config.reductions]
    for run in runs:
        for path in shares.journals(run.folder).values():
            check_same_run(path, run.fingerprint)
    return dataclasses.replace(plan, runs=tuple(runs))


def read_questions(config: TaskConfig, *, with_images: bool) -> TaskQuestions:
    """The questions of a benchmark whose files are given, checked; errors as in `plan_runs`."""
    assert config.files is not None
    questions = TaskQuestions(Task(config.benchmark, *config.files))
    if with_images:
        questions.check_images()
    return questions


def _own_questions(config: TaskConfig, workdir: pathlib.Path) -> TaskQuestions:
    """The questions that a benchmark makes itself; of several processes the first one writes."""
    benchmark, folder = config.benchmark, workdir / f"{config.benchmark.name}_questions"
    if is_leader():
        benchmark.write_default_files(folder, config.options)
    return TaskQuestions(Task(benchmark, *benchmark.default_files(folder)))


def _own_mesh(sizes: Mapping[str, int]) -> Mesh | None:
    """The mesh on devices of this process alone; None for one device."""
    needed, devices = math.prod(sizes.values()), jax.local_devices()
    if needed == 1:
        return None
    if needed > len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"--config.mesh needs {needed} devices, and each process has {len(devices)}: every "
            "process lays the whole model out on devices of its own"
        )
    return sharding.mesh_on(devices, **sizes)


def _check_limit(decoding: Decoding, config: TaskConfig, model: LlavaConfig) -> None:
    limit, positions = decoding.max_new_tokens, model.text.max_positions
    if limit is not None and limit >= positions:
        raise ValueError(
            f"{config.benchmark.name} asks for answers of up to {limit} tokens, but the model "
            f"takes {positions} positions, prompt included; pass "
            f"--config.decoding.max_new_tokens={positions // 4} or another limit"
        )

"""What to evaluate: the fields of `configs/eval.py`, read and checked once.

Nothing below `run.evaluate` sees a ConfigDict. Everything that the fields alone tell is checked
here, so that a mistake is reported in one line before a file is read or written.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, get_args

import jax.numpy as jnp
from ml_collections import ConfigDict

from prumerge_jax import cost
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.data.templates import TEMPLATES
from prumerge_jax.engine.encoding import DTYPES
from prumerge_jax.engine.request import MAX_SEED
from prumerge_jax.engine.shapes import EVALUATION_SIZES, EngineConfig
from prumerge_jax.evaluation.benchmarks.base import PROTOCOLS, Benchmark, TaskFiles
from prumerge_jax.evaluation.benchmarks.registry import BENCHMARKS, benchmark, unnamed_benchmark
from prumerge_jax.messages import quoted
from prumerge_jax.models.quantisation import FORMATS
from prumerge_jax.options import unknown
from prumerge_jax.reductions import parse_list, with_budgets

TASK_FIELDS = ("benchmark", "questions", "images", "annotations")
FIELDS = (
    *(
        "checkpoint",
        *TASK_FIELDS,
        "tasks",
        "answers",
        "reduction",
        "tokens",
        "baselines",
        "decoding",
    ),
    *("dtype", "quantize", "cache_dtype", "mesh", "engine", "chip"),
)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
      protocol: whose image handling, see `benchmarks.base.PROTOCOLS`.
      conversation: prompt template; None is the model's own.
      position_ids: see `packing.pack_window`.
      max_new_tokens: None takes the benchmark's limit.
      temperature: divides the logits; 0 is greedy.
      top_p: smallest probability mass to draw from.
      seed: row i draws with seed + i.
      num_workers: processes that decode images.

    Raises:
      ValueError: a value is not allowed; the message names its flag.
    """

    protocol: str = "llava-1.6"
    conversation: str | None = None
    position_ids: PositionIds = "compact"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("protocol", PROTOCOLS),
            ("position_ids", get_args(PositionIds)),
        ):
            _one_of(f"decoding.{name}", getattr(self, name), known)
        if self.conversation is not None:
            _one_of("decoding.conversation", self.conversation, sorted(TEMPLATES))
        for name, allowed, expected in (
            ("max_new_tokens", lambda n: n is None or n >= 1, "at least 1, or None"),
            ("temperature", lambda t: math.isfinite(t) and t >= 0, "a finite number from 0"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("seed", lambda s: 0 <= s < MAX_SEED, f"from 0 to {MAX_SEED - 1}"),
            ("num_workers", lambda n: n >= 0, "at least 0"),
        ):
            value = getattr(self, name)
            if not allowed(value):
                raise ValueError(f"--config.decoding.{name}={value}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One benchmark to run.

    Attributes:
      benchmark: the benchmark.
      files: its files; None where it makes them itself, see `Benchmark.write_default_files`.
      options: options for that.
    """

    benchmark: Benchmark[Any]
    files: TaskFiles | None
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation, see `configs/eval.py`.

    Attributes:
      tasks: the benchmarks, each at most once.
      checkpoint: model directory, or the name of a shipped model; empty without one.
      answers: answers file to score instead of a model's.
      reductions: their names, distinct, in order.
      baselines: whether each runs against random, uniform and a smaller image at equal counts.
      decoding: how answers are made.
      position_ids: None takes each benchmark's default.
      dtype: None computes as stored.
      quantize: format of the decoder's kernels; None is the checkpoint's own.
      cache_dtype: dtype of keys and values, int8 or None for that of computation.
      mesh: sizes of the mesh's axes.
      engine: shapes of the jitted functions.
      chip: chip to compare the speed with; None prints no comparison.
    """

    tasks: tuple[TaskConfig, ...]
    checkpoint: str
    answers: pathlib.Path | None
    reductions: tuple[str, ...]
    baselines: bool
    decoding: Decoding
    position_ids: PositionIds | None
    dtype: jnp.dtype | None
    quantize: str | None
    cache_dtype: str | None
    mesh: Mapping[str, int]
    engine: EngineConfig
    chip: str | None

    def decoding_for(self, task: Benchmark[Any]) -> Decoding:
        """How the answers of one benchmark are made, its limits filled in."""
        return dataclasses.replace(
            self.decoding,
            position_ids=self.position_ids or task.position_ids,
            max_new_tokens=self.decoding.max_new_tokens or task.max_new_tokens,
        )


def parse_config(config: ConfigDict) -> EvalConfig:
    """Reads the fields of a configuration.

    Raises:
      ValueError: a field is unknown, of another type or out of bounds; the message names it.
    """
    fields = _mapping("config", config)
    options = {
        entry.name: _options(entry, fields.get(entry.name))
        for entry in BENCHMARKS.values()
        if entry.default_options is not None
    }
    _check_names("config", fields, (*FIELDS, *options))
    if missing := [name for name in FIELDS if name not in fields]:
        raise ValueError(f"config lacks the fields {missing}; start from configs/eval.py")
    answers = _optional(fields, "answers", str)
    decoding = {k: v for k, v in _mapping("decoding", fields["decoding"]).items() if v is not None}
    _check_fields("decoding", decoding, Decoding)
    mesh = _mapping("mesh", fields["mesh"])
    _check_names("mesh", mesh, ("data", "fsdp", "tensor"))
    for axis, size in mesh.items():
        if _typed(f"mesh.{axis}", size, int) < 1:
            raise ValueError(f"--config.mesh.{axis}={size}: expected at least 1")
    dtype, chip = _optional(fields, "dtype", str), _optional(fields, "chip", str)
    quantize, cache = (_optional(fields, name, str) for name in ("quantize", "cache_dtype"))
    tasks = _tasks(fields, options)
    usual = (tasks[0].benchmark if len(tasks) == 1 else Benchmark).reductions
    names = usual if fields["reduction"] is None else _typed("reduction", fields["reduction"], str)
    return EvalConfig(
        tasks=tasks,
        checkpoint=_optional(fields, "checkpoint", str) or "",
        answers=None if answers is None else pathlib.Path(answers),
        reductions=_reductions(names, _typed("tokens", fields["tokens"], str)),
        baselines=_typed("baselines", fields["baselines"], bool),
        decoding=Decoding(**decoding),
        position_ids=decoding.get("position_ids"),
        dtype=None if dtype is None else jnp.dtype(_one_of("dtype", dtype, DTYPES)),
        quantize=None if quantize is None else _one_of("quantize", quantize, FORMATS),
        cache_dtype=None if cache is None else _one_of("cache_dtype", cache, ("int8",)),
        mesh=mesh,
        engine=engine_config(fields["engine"], mesh),
        chip=None if chip is None else _one_of("chip", chip, sorted(cost.CHIPS)),
    )


def _reductions(names: str, tokens: str) -> tuple[str, ...]:
    """The reductions to run, those of fixed count at every budget."""
    spellings = list(parse_list(names))
    if not (words := tokens.replace(",", " ").split()):
        return tuple(spellings)
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"--config.tokens={quoted(tokens)}: expected counts such as '128 64 32'")
    expanded = [each for name in spellings for each in with_budgets(name, list(map(int, words)))]
    if expanded == spellings:
        raise ValueError(
            f"--config.tokens={quoted(tokens)}: none of {quoted(names)} keeps a fixed count that "
            "is not named; expected for example cover"
        )
    return tuple(dict.fromkeys(expanded))


def engine_config(fields: Mapping[str, Any], mesh: Mapping[str, int]) -> EngineConfig:
    """The fixed shapes of the engine.

    Raises:
      ValueError: a size that was set does not divide over the data shards of the mesh, or is not
        allowed; the message names its flag.
    """
    given = {k: v for k, v in _mapping("engine", fields).items() if v is not None}
    types = {field.name: field.type for field in dataclasses.fields(EngineConfig)}
    for name in ("defaults", "short_rows", "pool_capacity"):  # these are not for flags
        del types[name]
    _check_names("engine", given, sorted(types))
    for name, value in given.items():
        _typed(f"engine.{name}", value, bool if types[name] is bool else int)
    config = EngineConfig(**given, defaults=EVALUATION_SIZES)
    config.sizes(mesh.get("data", 1) * mesh.get("fsdp", 1))
    return config


def _tasks(
    fields: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> tuple[TaskConfig, ...]:
    """`config.tasks`, or the one task that the configuration's top-level fields describe."""
    given = fields["tasks"]
    if not isinstance(given, list | tuple):
        raise ValueError(f"config.tasks: expected a list of dicts, not {given!r:.80}")
    if not given:
        return (_task("config", {name: fields.get(name) for name in TASK_FIELDS}, options),)
    tasks = []
    for number, entry in enumerate(given, start=1):
        where = f"config.tasks entry {number}"
        values = _mapping(where, entry)
        _check_names(where, values, TASK_FIELDS)
        tasks.append(_task(where, values, options))
    names = [task.benchmark.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"config.tasks names {name} twice; their answers would share a folder")
    return tuple(tasks)


def _task(
    where: str, values: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> TaskConfig:
    name, questions, images, annotations = (
        _optional(values, field, str, where) for field in TASK_FIELDS
    )
    paths = [None if p is None else pathlib.Path(p) for p in (questions, images, annotations)]
    if name is not None:
        chosen = benchmark(name)
    else:
        chosen = unnamed_benchmark(has_questions=questions is not None)
    if paths[0] is not None:
        return TaskConfig(chosen, TaskFiles(paths[0], *paths[1:]), {})
    if chosen.default_options is None:
        raise ValueError(f"{chosen.name} needs its question file: --config.questions=FILE")
    for field, path in zip(TASK_FIELDS[2:], paths[1:], strict=True):
        if path is not None:
            raise ValueError(
                f"--config.{field}={path} without --config.questions=FILE: {chosen.name} would "
                "make its own files; give all of them, or none"
            )
    chosen.check_default_options(options[chosen.name])
    return TaskConfig(chosen, None, options[chosen.name])


def _options(task: Benchmark[Any], given: Any) -> Mapping[str, Any]:
    """The options of a benchmark that makes its own files, of the types of their defaults."""
    assert task.default_options is not None
    values = _mapping(task.name, given or {})
    _check_names(task.name, values, task.default_options)
    for name, value in values.items():
        _typed(f"{task.name}.{name}", value, type(task.default_options[name]))
    return {**task.default_options, **values}


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected named fields, not {value!r:.80}")
    return value


def _check_names(where: str, values: Mapping[str, Any], known: Any) -> None:
    for name in values:
        if name not in known:
            raise ValueError(unknown(f"{where} has no field", str(name), known))


def _check_fields(where: str, values: Mapping[str, Any], kind: type) -> None:
    """Names and types of a section against a dataclass whose defaults show the types."""
    types: dict[str, type] = {"max_new_tokens": int, "conversation": str}
    types |= {f.name: type(f.default) for f in dataclasses.fields(kind) if f.default is not None}
    _check_names(where, values, types)
    for name, value in values.items():
        _typed(f"{where}.{name}", value, types[name])


def _optional(values: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """A field that may be missing, None or empty, which is the same."""
    value = values.get(name)
    if value is None or value == "":
        return None
    return _typed(f"{where} {name}".removeprefix("config ").strip(), value, kind)


def _typed(name: str, value: Any, kind: type) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config.{name}: expected {kind.__name__}, not {value!r:.80}")
    return value


def _one_of(name: str, value: str, known: Any) -> str:
    if value not in known:
        what = f"--config.{name}: unknown {name.rpartition('.')[2].replace('_', ' ')}"
        raise ValueError(unknown(what, value, known))
    return value

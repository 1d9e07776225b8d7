"""The names of reductions, and their one spelling: `prumerge:neighbours=8,merge=mean`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prumerge_jax import options
from prumerge_jax.messages import quoted
from prumerge_jax.reductions.base import Reduction
from prumerge_jax.reductions.baselines import Baseline, Choice


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a name means.

    Attributes:
      method: a frozen dataclass whose fields are the parameters.
      values: those that the name sets.
      shorthand: the parameter that may be written without its name, as in `downsample:8`.
    """

    method: type[Reduction]
    values: Mapping[str, Any]
    shorthand: str | None = None


_ENTRIES: dict[str, _Entry] = {}
# Short names for the baselines of `prumerge`.
_BASELINES = {"random": ("prumerge", "ranking=random"), "uniform": ("prumerge", "ranking=uniform")}


def register(
    name: str, method: type[Reduction], *, shorthand: str | None = None, **values: Any
) -> None:
    """Gives a method a name, with the parameters that the name sets.

    Args:
      name: without `:`, `,`, `=` or a space.
      method: see `Reduction`.
      shorthand: the one parameter that may be written without its name.
      **values: parameters; the others have the method's defaults.
    """
    if name in names() or set(name) & set(":,= "):
        raise ValueError(f"{name!r} cannot be registered: taken, or no name")
    if taken := set(options.options(method)) & set(options.options(Choice)):
        raise ValueError(f"{name}: every reduction has the parameters {sorted(taken)} already")
    _ENTRIES[name] = _Entry(method, values, shorthand)


def names() -> tuple[str, ...]:
    """All names that `parse` knows, sorted."""
    return tuple(sorted({*_ENTRIES, *_BASELINES}))


def parameters(name: str) -> Mapping[str, options.Option]:
    """The parameters of a registered reduction, by name."""
    name, _ = _BASELINES.get(name, (name, ""))
    return {**options.options(_ENTRIES[name].method), **options.options(Choice)}


def parse(spelling: str) -> Reduction:
    """Reads a reduction as it is written everywhere: `NAME` or `NAME:PARAMETER=VALUE,...`.

    `ranking=random` or `ranking=uniform` makes any reduction that selects patches a baseline of
    equal counts. `random` and `uniform` are those of `prumerge`.

    Raises:
      ValueError: one line that names the nearest valid name, or what was expected.
    """
    name, separator, written = spelling.partition(":")
    if name not in names():
        raise ValueError(options.unknown("unknown reduction", name, names()))
    parts = written.split(",") if separator else []
    if name in _BASELINES:
        name, ranking = _BASELINES[name]
        parts = [ranking, *parts]
    try:
        return _make(name, parts)
    except ValueError as error:
        raise ValueError(f"reduction {quoted(spelling)}: {error}") from None


def _make(name: str, parts: Sequence[str]) -> Reduction:
    entry = _ENTRIES[name]
    choice = options.options(Choice)
    known = {**options.options(entry.method), **choice}
    values: dict[str, Any] = {}
    for part in parts:
        parameter, separator, text = part.partition("=")
        if not separator and entry.shorthand and not values:
            parameter, text = entry.shorthand, part
        elif not separator:
            raise ValueError(f"{quoted(part)} is not 'parameter=value'")
        if parameter not in known:
            raise ValueError(options.unknown("no such parameter", parameter, known))
        if parameter in values:
            raise ValueError(f"{parameter} is given twice")
        values[parameter] = known[parameter].read(text)
    chosen = options.make(Choice, {p: v for p, v in values.items() if p in choice})
    own = {p: v for p, v in values.items() if p not in choice}
    reduction: Reduction = options.make(entry.method, {**entry.values, **own})
    return chosen.apply(reduction)


def parse_list(text: str) -> dict[str, Reduction]:
    """Reads several reductions, separated by spaces: `full prumerge+ prumerge:neighbours=8`.

    Commas separate the parameters of one reduction. Between names without parameters they are
    taken for spaces.

    Returns:
      The reductions by their spelling, in order, each once.

    Raises:
      ValueError: none is named, or one of them is not valid.
    """
    spellings: list[str] = []
    for word in text.split():
        word = word.rstrip(",")
        spellings += [word] if ":" in word else filter(None, word.split(","))
    if not spellings:
        raise ValueError("no reduction is named; expected for example 'full prumerge+'")
    return {spelling: _parse_one_of_many(spelling) for spelling in spellings}


def _parse_one_of_many(spelling: str) -> Reduction:
    before, _, written = spelling.partition(":")
    words = [*before.split(","), *(part.partition(":")[0] for part in written.split(","))]
    if "," in spelling and sum(word in names() for word in words) > 1:
        raise ValueError(
            f"reduction {quoted(spelling)}: several reductions are separated by a space; commas "
            "separate the parameters of one"
        )
    return parse(spelling)


def spell(reduction: Reduction) -> str:
    """The shortest spelling of a reduction: `parse(spell(reduction)) == reduction`.

    One whose method has no name is spelled by its `repr`.
    """
    if isinstance(reduction, Baseline):
        seed = [f"seed={reduction.seed}"] if reduction.seed else []
        return _joined(spell(reduction.counted), [f"ranking={reduction.ranking}", *seed])
    spellings = []
    for name, entry in _ENTRIES.items():
        if type(reduction) is entry.method:
            fields = options.options(entry.method)
            usual = {p: field.default for p, field in fields.items()} | dict(entry.values)
            own = {p: getattr(reduction, p) for p in fields}
            spellings.append((name, [f"{p}={v}" for p, v in own.items() if v != usual[p]]))
    if not spellings:
        return repr(reduction)
    return _joined(*min(spellings, key=lambda spelling: len(spelling[1])))


def with_parameters(spelling: str, **values: object) -> str:
    """A spelling with further parameters appended."""
    return _joined(spelling, [f"{name}={value}" for name, value in values.items()])


def with_budgets(spelling: str, budgets: Sequence[int]) -> list[str]:
    """A reduction of fixed count at several budgets; the spelling alone where it names its own.

    Raises:
      ValueError: the reduction or a budget is not valid.
    """
    reduction = parse(spelling)
    counted = reduction.counted if isinstance(reduction, Baseline) else reduction
    named = {part.partition("=")[0] for part in spelling.partition(":")[2].split(",")}
    if counted.varying or "tokens" in named or "tokens" not in options.options(type(counted)):
        return [spelling]
    spellings = [with_parameters(spelling, tokens=budget) for budget in budgets]
    for each in spellings:
        parse(each)
    return spellings


def equal_count_baselines(spelling: str) -> list[str]:
    """The spellings of a reduction's baselines of equal counts; none where it selects nothing."""
    reduction = parse(spelling)
    if isinstance(reduction, Baseline) or not reduction.selects_patches:
        return []
    return [with_parameters(spelling, ranking=ranking) for ranking in ("random", "uniform")]


def _joined(spelling: str, parts: Sequence[str]) -> str:
    if not parts:
        return spelling
    return f"{spelling}{',' if ':' in spelling else ':'}{','.join(parts)}"

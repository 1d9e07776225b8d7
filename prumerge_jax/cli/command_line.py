"""What all programs share: flags, and a user's mistake as one line on standard error.

Flags are absl's. In a program with `--config` every field of the configuration is a flag, too:
`--config.batch_size=64`.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import absl.logging
from absl import flags
from ml_collections import ConfigDict, config_flags

from prumerge_jax.cli import recipes
from prumerge_jax.messages import nearest, quoted, shortened

_HELP = {"help", "helpshort", "helpfull", "h", "?"}
_INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it."""

_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false"}


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs a program and exits with its status.

    Args:
      main: takes the command line; returns the exit status, None for 0.
      argv: the command line, program first; by default this process's.
    """
    argv = sys.argv if argv is None else argv
    absl.logging.use_absl_handler()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(argv[:1])  # absl.logging asks for it
    try:
        with mistakes_in_one_line(argv):
            status = main(argv)
    except KeyboardInterrupt:
        print(f"{program_name(argv)}: interrupted", file=sys.stderr)
        status = _INTERRUPTED
    sys.exit(status)


@contextmanager
def mistakes_in_one_line(argv: Sequence[str]) -> Iterator[None]:
    """Ends the program with status 1 and one line where input, machine or disk is at fault.

    These are ValueError, which all our error classes derive from, OSError and a missing
    package; anything else is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError, flags.Error) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"{program_name(argv)}: {text}")


def program_name(argv: Sequence[str]) -> str:
    """The program as messages name it: `train.py`, or `prumerge-train`."""
    return os.path.basename(argv[0])


def workdir_or_aot(example: str, planned: str) -> flags.FlagValues:
    """The flags `--workdir` and `--aot` of a program that runs, or plans a run.

    Args:
      example: a TPU slice.
      planned: what the plan is of.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "directory of the run; new, or to be resumed", flag_values=values
    )
    flags.DEFINE_string(
        "aot",
        None,
        f"a TPU slice such as {example}: print the plan of {planned} on it, and run nothing",
        flag_values=values,
    )
    return values


def define_processes(values: flags.FlagValues) -> None:
    """Adds the flags of a program that several processes run together."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0; found on TPU pods, by SLURM and by Open MPI",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "number of processes, with --coordinator", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "process_id", None, "index of this process, with --coordinator", 0, flag_values=values
    )
    flags.DEFINE_integer(
        "heartbeat_seconds",
        60,
        "a process silent for longer counts as dead, and all end",
        1,
        flag_values=values,
    )


def session(values: flags.FlagValues) -> AbstractContextManager[None]:
    """What `define_processes` describes: joins the others, and leaves together with them."""
    from prumerge_jax.sharding.startup import distributed_session  # takes seconds

    return distributed_session(
        values.coordinator,
        values.num_processes,
        values.process_id,
        heartbeat_seconds=values.heartbeat_seconds,
    )


def check_workdir_or_aot(values: flags.FlagValues) -> None:
    """Raises ValueError unless one of the two flags is given."""
    if bool(values.workdir) == bool(values.aot):
        raise ValueError("give one of --workdir=DIR and --aot=SLICE")


def strings(*described: tuple[str, str | None, str]) -> flags.FlagValues:
    """Flags that take text, from the name, default and help of each."""
    values = flags.FlagValues()
    for name, default, help_text in described:
        flags.DEFINE_string(name, default, help_text, flag_values=values)
    return values


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises ValueError for the first of these flags that is not given."""
    for name in names:
        if not values[name].value:
            raise ValueError(f"--{name} is missing: {values[name].help}")


def parse(argv: Sequence[str], values: flags.FlagValues, description: str) -> None:
    """Sets the flags of a program without `--config`.

    Raises:
      ValueError: a flag is unknown, or its value is not of its type.
      SystemExit: after `--help`.
    """
    _parse(argv, values, description, fields="")


def parse_with_config(
    argv: Sequence[str],
    values: flags.FlagValues,
    description: str,
    default: str | None = None,
) -> ConfigDict:
    """Sets the flags of a program, and reads and changes the configuration that they name.

    Args:
      argv: the command line.
      values: the flags in addition to `--config`; the configuration's fields are added.
      description: printed by `--help`.
      default: the recipe where `--config` is not given; None makes the flag required.

    Returns:
      The configuration, locked: it has no other fields.

    Raises:
      ValueError: a flag or recipe is unknown, or a value is not of its type.
      SystemExit: after `--help`.
    """
    arguments = values.read_flags_from_files(list(argv[1:]), force_gnu=False)
    recipe, arguments = _take_config(arguments, default)
    command_line = [argv[0], *arguments]
    published = ", ".join(recipes.names())
    help_text = f"  --config: a Python file, or one of {published}"
    if recipe is None:
        if _wants_help(command_line):
            _parse(command_line, values, description, help_text)
        others = [argument for argument in command_line if not argument.startswith("--config.")]
        _refuse_unknown(others, values)
        raise ValueError(f"--config is missing; give a file or one of {published}")
    config = recipes.load(recipe)
    fields = list(_fields(config))
    # config_flags defines flags for the fields that it sees on a command line: for all of them.
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=[f"--config.{field}" for field in fields]
    )
    named = {field: _value(config, field) for field in fields}
    listed = [
        f"  --config.{field}={value}"
        for field, value in named.items()
        if not isinstance(value, ConfigDict)
    ]
    listed = [help_text, "", f"Fields of {recipe}:", *listed]
    _parse(command_line, values, description, "\n".join(listed))
    return config


def _take_config(arguments: list[str], default: str | None) -> tuple[str | None, list[str]]:
    """Splits `--config` off; if there are several, the last one counts."""
    recipe, others = default, []
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name not in ("--config", "-config"):
            others.append(argument)
        elif has_value:
            recipe = value
        else:
            recipe = next(remaining, "")
    if recipe == "":
        raise ValueError("--config has no value; expected a recipe's name or file")
    return recipe, others


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Names of all fields that have a type, parents before their parts."""
    for key in config:
        if not isinstance(config.get_type(key), type) or config.get_type(key) is type(None):
            continue
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _fields(config[key], f"{prefix}{key}.")


def _value(config: ConfigDict, field: str) -> object:
    """The value of a field that is named with dots."""
    value = config
    for key in field.split("."):
        value = value[key]
    return value


def _parse(argv: Sequence[str], values: flags.FlagValues, description: str, fields: str) -> None:
    if _wants_help(argv):
        print(f"{description.strip()}\n\n{_listed(values)}\n{fields}".rstrip())
        sys.exit(0)
    _refuse_unknown(argv, values)
    try:
        _, *unexpected = values(argv)
    except flags.IllegalFlagValueError as error:
        raise ValueError(_wrong_value(values, error)) from None
    if unexpected:
        raise ValueError(
            f"unexpected argument {quoted(unexpected[0])}; flags are written --name=value"
        )


def _wants_help(argv: Sequence[str]) -> bool:
    return any(argument.startswith("-") and argument.lstrip("-") in _HELP for argument in argv[1:])


def _listed(values: flags.FlagValues) -> str:
    lines = ["Flags:"]
    for name in sorted(values):
        flag = values[name]
        if name == flag.name and name.partition(".")[0] != "config":
            default = "" if flag.default is None else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _refuse_unknown(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Raises ValueError for an unknown flag, with the nearest name that exists.

    absl has suggestions too; it searches for them without bound in names of any length.
    """
    for argument in itertools.takewhile(lambda argument: argument != "--", argv[1:]):
        name = argument.lstrip("-").partition("=")[0]
        is_flag = argument.startswith("-") and name[:1].isalpha()  # -1 is a value
        if not is_flag or name in values or name.removeprefix("no") in values:
            continue
        near = nearest(name, [*values, "config"])
        hint = f"did you mean --{near}?" if near else "--help lists all flags"
        raise ValueError(f"unknown flag --{shortened(name)}; {hint}")


def _wrong_value(values: flags.FlagValues, error: Exception) -> str:
    """Says what the value of a flag should have been, where its type says so."""
    name, separator, rest = str(error).removeprefix("flag --").partition("=")
    if not separator or name not in values:
        return str(error)
    expected = _TYPES.get(values[name].parser.flag_type())
    if "as a ConfigDict" in rest:
        expected = "a dict such as {'name': value}; its fields are flags, too"
    if expected is None:
        return f"--{name}={shortened(rest, 200)}"
    given = rest.partition(": ")[0]
    return f"--{name}={shortened(given)}: expected {expected}"

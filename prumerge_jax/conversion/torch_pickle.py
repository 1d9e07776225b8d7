"""The pickles inside PyTorch's files, interpreted without unpickling.

A pickle is a program for a stack machine. Here only those of its instructions are carried out that
build dictionaries of tensors, on inert stand-ins: nothing is imported and nothing is called, so a
hostile file can at most be refused.
"""

import dataclasses
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from prumerge_jax.conversion.tensor_files import ConversionError

_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# A 13B model in one file has 760 tensors, which take some 30 instructions each.
_MAX_INSTRUCTIONS = 60_000
_MAX_NAME = 200  # characters of a module or a class
_MAX_SIZE = 1 << 62
_STORAGE_OF = {np.dtype(dtype): name for name, dtype in _STORAGES.items()}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for; never looked up."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """One entry of the archive: its key, and what it holds."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, in the storage."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)


_MARK = object()


class _Machine:
    """The stack machine of pickle, reduced to what dictionaries of tensors need."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def fail(self, what: str) -> ConversionError:
        return ConversionError(f"{self.where}: refused, its pickle {what}")

    def pop_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def pop_tuple(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.fail("sets items of something that is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise self.fail(f"has a key that is {_describe(key)}, no string")
            if key in target:
                raise self.fail(f"sets {key[:80]!r} twice")
            target[key] = value

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", _Global("torch", name), str(key), str(_), int(numel)):
                if name not in _STORAGES or not 0 <= numel < _MAX_SIZE:
                    raise self.fail(f"has a storage of type {name[:60]!r} or of no sound size")
                self.stack.append(Storage(key, np.dtype(_STORAGES[name]), numel))
            case other:
                raise self.fail(f"refers to {_describe(other)}, which is not a storage")

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case _Global("collections", "OrderedDict"), ():
                self.stack.append({})
            case (
                _Global("torch._utils", "_rebuild_tensor_v2"),
                (Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), *_),
            ):
                self.stack.append(self.tensor(storage, offset, shape, strides))
            case (
                _Global("torch._utils", "_rebuild_parameter"),
                (TensorRef() as tensor, bool(), dict()),
            ):
                self.stack.append(tensor)
            case _:
                raise self.fail(f"calls {_describe(function)}, which builds no tensor")

    def tensor(
        self, storage: Storage, offset: int, shape: Sequence[Any], strides: Sequence[Any]
    ) -> TensorRef:
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > 8:
            raise self.fail(f"has a tensor of rank {len(shape)} with {len(strides)} strides")
        if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in sizes):
            raise self.fail("has a tensor whose shape, strides or offset are not sizes")
        return TensorRef(storage, offset, tuple(shape), tuple(strides))

    def build(self) -> None:
        # The state of an OrderedDict: `_metadata`, version numbers of modules.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise self.fail("sets the state of something that is not a dictionary")


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _append(machine: _Machine, argument: Any) -> None:
    items = machine.pop_mark() if argument is _MARK else [machine.stack.pop()]
    if not isinstance(machine.stack[-1], list):
        raise machine.fail("appends to something that is not a list")
    machine.stack[-1].extend(items)


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    _push_global(machine, module, name)


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    _push_global(machine, module, name)


def _push_global(machine: _Machine, module: Any, name: Any) -> None:
    # Of other things than strings a pickle can build ones that are too large to compare or print.
    for part in (module, name):
        if not isinstance(part, str) or len(part) > _MAX_NAME:
            raise machine.fail(f"names a class by {_describe(part)}")
    machine.stack.append(_Global(module, name))


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[argument] = machine.stack[-1]


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.stack.append(_MARK),
    "NONE": _push,
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "BININT": _push,
    "BININT1": _push,
    "BININT2": _push,
    "LONG1": _push,
    "BINFLOAT": _push,
    "BINUNICODE": _push,
    "SHORT_BINUNICODE": _push,
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.pop_tuple(1),
    "TUPLE2": lambda m, a: m.pop_tuple(2),
    "TUPLE3": lambda m, a: m.pop_tuple(3),
    "APPEND": _append,
    "APPENDS": lambda m, a: _append(m, _MARK),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda m, a: _put(m, len(m.memo)),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "BINPERSID": lambda m, a: m.persistent(),
    "REDUCE": lambda m, a: m.reduce(),
    "BUILD": lambda m, a: m.build(),
}


def interpret(pickle: bytes, where: str) -> dict[str, TensorRef]:
    """The tensors that a pickle describes.

    Args:
      pickle: the content of `data.pkl`.
      where: names the file in errors.

    Raises:
      ConversionError: it holds anything but one flat dictionary of tensors.
    """
    machine = _Machine(where)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if opcode.name == "STOP":
                break
            if count >= _MAX_INSTRUCTIONS:
                raise machine.fail(f"has more than {_MAX_INSTRUCTIONS} instructions")
            if opcode.name not in _INSTRUCTIONS:
                raise machine.fail(f"uses {opcode.name}, which tensors do not need")
            _INSTRUCTIONS[opcode.name](machine, argument)
        (result,) = machine.stack
    except ConversionError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise machine.fail(f"is malformed ({str(error)[:100]!r})") from None
    if not isinstance(result, dict):
        raise machine.fail("holds no dictionary of tensors")
    for name, value in result.items():
        if not isinstance(value, TensorRef):
            raise machine.fail(f"holds {name[:80]!r}, which is not a tensor")
    return result


def write_pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The `data.pkl` of a dictionary of contiguous tensors, storages numbered in its order."""
    parts = [b"\x80\x02}("]
    for number, (name, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in np.empty_like(array, order="C").strides]
        storage = [
            _text("storage"),
            f"ctorch\n{_STORAGE_OF[array.dtype]}\n".encode(),
            _text(str(number)),
            _text("cpu"),
            _integer(array.size),
        ]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(" + b"".join(storage) + b"tQ",
            _integer(0),
            b"(" + b"".join(_integer(size) for size in array.shape) + b"t",
            b"(" + b"".join(_integer(stride) for stride in strides) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",  # requires_grad False, no backward hooks
        ]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _describe(value: Any) -> str:
    """A value in error messages; nested ones are named by their type only."""
    if isinstance(value, _Global):
        return repr(f"{value.module}.{value.name}"[:80])
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"

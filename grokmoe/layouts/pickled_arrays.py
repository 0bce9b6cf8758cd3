"""Arrays in a pickle, found without unpickling it.

Unpickling runs what the file says. Here nothing is run: the file's operations move values of a few harmless kinds
about on a stack, and the only ones understood are those with which a numpy array, alone or two of them in xAI's
QuantizedWeight8bit, is written. Whatever else turns up is refused. The arrays' bytes are skipped: what comes out is
where they are, so that they can be mapped.

Operations and their arguments: `pickletools` in the standard library. What an array is built with: numpy's
`ndarray.__reduce__` and `dtype.__reduce__`.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from typing import Any, BinaryIO

from grokmoe.errors import CheckpointError
from grokmoe.layouts.mapped_file import MappedFile, file_error

ITEM_TYPES = {"i1": ("I8", 1), "f4": ("F32", 4), "f2": ("F16", 2), "bfloat16": ("BF16", 2)}
"""numpy's name of an element type -> that of safetensors, and bytes."""

MAX_OPERATIONS = 1000
"""A shard of xAI's has some 60."""

MAX_TEXT = 64
"""Bytes of a string; the longest that is needed is `numpy._core.multiarray`."""

MAX_PROTOCOL = 4
"""That of xAI's shards. From 5 on numpy writes arrays otherwise."""

_ARRAY, _DTYPE, _QUANTIZED, _RECONSTRUCT = "array", "dtype", "QuantizedWeight8bit", "_reconstruct"
_CLASSES = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("__main__", "QuantizedWeight8bit"): _QUANTIZED,
    ("model", "QuantizedWeight8bit"): _QUANTIZED,
    ("ml_dtypes", "bfloat16"): "bfloat16",
    ("jaxlib.xla_extension", "bfloat16"): "bfloat16",
}
"""What a file may name, and the word that stands for it here. Nothing of it is imported."""


@dataclasses.dataclass(frozen=True)
class ArrayBytes:
    """Where an array lies in its file, in C order. dtype: a name of safetensors."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """One file's array; with scales it is quantised."""

    weight: ArrayBytes
    scales: ArrayBytes | None = None


def read_pickle(file: BinaryIO, mapped: MappedFile) -> PickledTensor:
    """The array of a file. file: `mapped`, open. Raises CheckpointError for everything else a pickle can be."""
    try:
        return _Machine(file, mapped).run()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise file_error(mapped.path, "a pickled array", f"what is none ({type(error).__name__}: {error})") from error


@dataclasses.dataclass(frozen=True)
class _Class:
    word: str


@dataclasses.dataclass
class _Object:
    """Something that a file has made. kind: of _ARRAY, _DTYPE, _QUANTIZED. state: what it was built with."""

    kind: str
    state: Any = None


@dataclasses.dataclass(frozen=True)
class _Bytes:
    begin: int
    size: int


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle, over values that can do nothing. Never shows or compares a value of unknown
    kind: nested ones can take for ever."""

    def __init__(self, file: BinaryIO, mapped: MappedFile) -> None:
        self._file, self._mapped = file, mapped
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> PickledTensor:
        """All operations in order."""
        for _ in range(MAX_OPERATIONS):
            code = self._read(1)
            if code == b".":
                return self._result()
            self._do(_NAMES.get(code, f"0x{code.hex()}"))
        raise self._refused(f"more than {MAX_OPERATIONS} operations")

    def _refused(self, what: str) -> CheckpointError:
        wanted = "a pickle of one numpy array or of one QuantizedWeight8bit with two, and nothing else"
        return file_error(self._mapped.path, wanted, f"{what}; nothing of the file was run")

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise file_error(self._mapped.path, "a whole pickle", f"{self._mapped.size} bytes (truncated)")
        return data

    def _number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._read(size), "little", signed=signed)

    def _do(self, name: str) -> None:
        """One operation. Those that are not understood are refused before their arguments are read."""
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO":
                if (version := self._number(1)) > MAX_PROTOCOL:
                    raise self._refused(f"protocol {version}")
            case "FRAME":  # how far to read ahead
                self._number(8)
            case "SHORT_BINUNICODE" | "BINUNICODE":
                size = self._number(1 if name.startswith("SHORT") else 4)
                if size > MAX_TEXT:
                    raise self._refused(f"a string of {size} bytes")
                stack.append(self._read(size).decode())
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                size = self._number({"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}[name])
                stack.append(self._skip(size))
            case "BININT" | "BININT1" | "BININT2":
                stack.append(self._number({"BININT": 4, "BININT1": 1, "BININT2": 2}[name], signed=name == "BININT"))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = 0 if name == "EMPTY_TUPLE" else int(name[-1])
                stack.append(tuple(reversed([stack.pop() for _ in range(number)])))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEMS":
                values = self._since_mark()
                keys = values[::2]
                if not all(isinstance(key, str) for key in keys) or not isinstance(stack[-1], dict):
                    raise self._refused("a dictionary of unknown kind")
                stack[-1].update(zip(keys, values[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[self._number(1 if name == "BINPUT" else 4)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[self._number(1 if name == "BINGET" else 4)])
            case "STACK_GLOBAL":
                class_name, module = stack.pop(), stack.pop()
                stack.append(self._class(module, class_name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._made_by(function, arguments))
            case "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                if not isinstance(made, _Class) or made.word != _QUANTIZED or len(arguments):
                    raise self._refused("an object of another class")
                stack.append(_Object(_QUANTIZED))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case _:
                raise self._refused(f"the operation {name}")

    def _skip(self, size: int) -> _Bytes:
        begin = self._file.tell()
        if begin + size > self._mapped.size:
            wanted = f"at least {begin + size} bytes"
            raise file_error(self._mapped.path, wanted, f"{self._mapped.size} bytes (truncated)")
        self._file.seek(size, 1)
        return _Bytes(begin, size)

    def _since_mark(self) -> list[Any]:
        at = next((i for i in reversed(range(len(self._stack))) if self._stack[i] is _MARK), None)
        if at is None:
            raise self._refused("an end without a beginning")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _class(self, module: Any, name: Any) -> _Class:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self._refused("a class without a name")
        word = _CLASSES.get((module, name))
        if word is None:
            raise self._refused(f"{module}.{name}")
        return _Class(word)

    def _made_by(self, function: Any, arguments: Any) -> _Object:
        """What a call makes. Two are known: numpy's maker of empty arrays, and its `dtype`."""
        word = function.word if isinstance(function, _Class) else None
        first = arguments[0] if isinstance(arguments, tuple) and arguments else None
        if word == _RECONSTRUCT and isinstance(first, _Class) and first.word == _ARRAY:
            return _Object(_ARRAY)
        if word == _DTYPE:
            item_type = first.word if isinstance(first, _Class) else first
            if not isinstance(item_type, str) or item_type not in ITEM_TYPES:
                raise self._refused(f"an array of {item_type if isinstance(item_type, str) else 'unknown type'}")
            return _Object(_DTYPE, item_type)
        raise self._refused(f"a call of {word or 'something that is no class'}")

    def _build(self, target: Any, state: Any) -> None:
        """Gives an object its state."""
        kind = target.kind if isinstance(target, _Object) else None
        if kind == _DTYPE and isinstance(state, tuple):  # (version, byte order, ...)
            order = state[1]
            if not isinstance(order, str) or order not in "<|=":
                raise self._refused("an array that is not little-endian")
        elif (kind == _ARRAY and isinstance(state, tuple)) or (kind == _QUANTIZED and isinstance(state, dict)):
            target.state = state
        else:
            raise self._refused(f"a {kind} that is built with {type(state).__name__}")

    def _result(self) -> PickledTensor:
        (value,) = self._stack
        if isinstance(value, _Object) and value.kind == _QUANTIZED and value.state is not None:
            if value.state.keys() != {"weight", "scales"}:
                raise self._refused(f"a QuantizedWeight8bit with {', '.join(sorted(value.state))}")
            return PickledTensor(self._array(value.state["weight"]), self._array(value.state["scales"]))
        return PickledTensor(self._array(value))

    def _array(self, value: Any) -> ArrayBytes:
        """From the state of a numpy array: (version, shape, dtype, whether in Fortran order, bytes)."""
        if not isinstance(value, _Object) or value.kind != _ARRAY or value.state is None:
            raise self._refused("something else")
        _, shape, dtype, is_fortran, data = value.state
        if not isinstance(dtype, _Object) or dtype.kind != _DTYPE or not isinstance(data, _Bytes):
            raise self._refused("an array that is built otherwise")
        if is_fortran is not False:
            raise self._refused("an array in Fortran order")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise self._refused("an array without a shape")
        name, item_size = ITEM_TYPES[dtype.state]
        if math.prod(shape) * item_size != data.size:
            wanted = f"{math.prod(shape) * item_size} bytes for {name} {list(shape)}"
            raise file_error(self._mapped.path, wanted, f"{data.size} bytes")
        return ArrayBytes(name, shape, data.begin, data.size)


_NAMES = {operation.code.encode("latin1"): operation.name for operation in pickletools.opcodes}

"""Pickles: the few that are read, and that nothing of any other is ever run."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import pickletools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import CheckpointError
from grokmoe.layouts.mapped_file import MappedFile
from grokmoe.layouts.pickled_arrays import MAX_OPERATIONS, ArrayBytes, PickledTensor, read_pickle
from tests.layouts.writers import QuantizedWeight8bit, pickled

ROOT = Path(__file__).resolve().parents[2]


def read(data: bytes) -> PickledTensor:
    return read_pickle(io.BytesIO(data), MappedFile(Path("tensor00000_000"), len(data), (0, 0, 0)))


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as raised:
        read(data)
    message = raised.value.message
    assert message.startswith("tensor00000_000: expected ")
    assert len(message) < 500
    return message


def content(array: ArrayBytes, data: bytes, dtype: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype, offset=array.begin, count=int(np.prod(array.shape))).reshape(array.shape)


ARRAYS = {
    "F32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "F16": np.arange(7, dtype=np.float16),
    "I8": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "BF16": np.arange(300).astype(ml_dtypes.bfloat16).reshape(100, 3),
}


@pytest.mark.parametrize("dtype", ARRAYS)
def test_an_array_is_found_where_it_lies(dtype: str) -> None:
    array = ARRAYS[dtype]
    data = pickled(array)
    found = read(data)
    assert found.scales is None
    assert (found.weight.dtype, found.weight.shape) == (dtype, array.shape)
    assert np.array_equal(content(found.weight, data, array.dtype), array)


@pytest.mark.parametrize("optimised", [False, True])
def test_a_quantised_weight_is_two_arrays(optimised: bool) -> None:
    weight, scales = ARRAYS["I8"], np.ones((1, 4), ml_dtypes.bfloat16)
    data = pickled(QuantizedWeight8bit(weight, scales))
    data = pickletools.optimize(data) if optimised else data
    found = read(data)
    assert found.scales is not None
    assert np.array_equal(content(found.weight, data, np.int8), weight)
    assert np.array_equal(content(found.scales, data, ml_dtypes.bfloat16), scales)


def test_names_of_other_versions_are_known() -> None:
    """numpy 1 called its module otherwise, and jaxlib had bfloat16 before ml_dtypes."""

    def renamed(data: bytes, old: str, new: str) -> bytes:
        before, after = (b"\x8c" + bytes([len(name)]) + name.encode() for name in (old, new))
        assert before in data
        data = data.replace(before, after)
        frame = len(data) - 11
        return data[:3] + frame.to_bytes(8, "little") + data[11:]

    data = pickled(ARRAYS["BF16"])
    for old, new in (("numpy._core.multiarray", "numpy.core.multiarray"), ("ml_dtypes", "jaxlib.xla_extension")):
        assert read(renamed(data, old, new)).weight.shape == (100, 3)
    data = pickled(QuantizedWeight8bit(ARRAYS["I8"], np.ones((1, 4), np.float32)))
    assert read(renamed(data, "__main__", "model")).scales is not None
    assert "numpy.evil" in refusal(renamed(data, "numpy._core.multiarray", "numpy.evil"))


class Calls:
    """Something whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


@dataclasses.dataclass
class Innocent:
    weight: int = 1


MALICIOUS = {
    "a shell": Calls(os.system, "touch PWNED"),
    "eval": Calls(eval, "open('PWNED', 'w')"),
    "a program": Calls(subprocess.Popen, ["touch", "PWNED"]),
    "a module": Calls(__import__, "this"),
    "numpy's own loader": Calls(np.load, "PWNED.npy"),
    "an attribute of what is allowed": Calls(getattr, np.ndarray, "tofile"),
    "within a shape": QuantizedWeight8bit(Calls(os.system, "touch PWNED"), np.ones(1, np.float32)),
    "in a list with an array": [ARRAYS["F32"], Calls(os.system, "touch PWNED")],
    "in a dictionary": {"weight": ARRAYS["F32"], Calls: 1},
    "another class": Innocent(),
    "an array of objects": np.array([Calls(os.system, "touch PWNED")], dtype=object),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("case", MALICIOUS)
def test_what_would_run_something_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickled(MALICIOUS[case], protocol)
    refusal(data)
    assert not list(tmp_path.iterdir())


def test_refusals_say_what_was_found() -> None:
    assert "posix.system; nothing of the file was run" in refusal(pickled(MALICIOUS["a shell"]))
    assert "builtins.eval" in refusal(pickled(MALICIOUS["eval"]))
    assert "tests.layouts.test_pickled_arrays.Innocent" in refusal(pickled(Innocent()))
    assert "the operation EMPTY_LIST" in refusal(pickled([1]))
    assert "the operation GLOBAL" in refusal(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    assert "protocol 5" in refusal(pickled(ARRAYS["F32"], 5))
    assert "an array in Fortran order" in refusal(pickled(np.asfortranarray(ARRAYS["F32"])))
    assert "an array of f8" in refusal(pickled(np.ones(3)))
    assert "not little-endian" in refusal(pickled(ARRAYS["F32"].astype(">f4")))
    assert "a QuantizedWeight8bit with bias, weight" in refusal(_with_other_fields())


def _with_other_fields() -> bytes:
    value = QuantizedWeight8bit(ARRAYS["I8"], None)
    value.bias = value.__dict__.pop("scales")  # type: ignore[attr-defined]
    return pickled(value)


def test_the_real_unpickler_would_have_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(MALICIOUS["a shell"]))
    assert (tmp_path / "PWNED").exists()


def test_nothing_is_imported() -> None:
    program = (
        "import sys, io, pathlib; from grokmoe.layouts.pickled_arrays import read_pickle;"
        "from grokmoe.layouts.mapped_file import MappedFile; before = set(sys.modules);"
        "data = sys.stdin.buffer.read();"
        "print(read_pickle(io.BytesIO(data), MappedFile(pathlib.Path('x'), len(data), (0, 0, 0))));"
        "assert set(sys.modules) == before and 'ml_dtypes' not in before"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], input=pickled(ARRAYS["BF16"]), capture_output=True, cwd=ROOT, timeout=120,
        check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr.decode()
    assert b"dtype='BF16'" in told.stdout


def nested(depth: int) -> bytes:
    """A tuple of the same twice, `depth` times over: 2 ** depth elements, if anybody looks."""
    twice = (b"\x94" + b"j" + number.to_bytes(4, "little") + b"\x86" for number in range(depth))
    return b"\x80\x04)" + b"".join(twice)


@pytest.mark.parametrize(
    "end",
    [b".", b"\x8c\x01x\x93.", b"}\x940(", b"R.", b"b.", b"\x81.", b"}(j\x05\x00\x00\x00Nu."],
    ids=["result", "name", "open", "call", "state", "object", "key"],
)
def test_values_that_take_for_ever_to_look_at_are_not_looked_at(end: bytes) -> None:
    began = time.monotonic()
    refusal(nested(200) + end)
    assert time.monotonic() - began < 5


def test_a_pickle_without_end_is_refused() -> None:
    assert f"more than {MAX_OPERATIONS} operations" in refusal(b"\x80\x04" + b"N" * 100_000)
    assert "a string of 4294967295 bytes" in refusal(b"\x80\x04X\xff\xff\xff\xff")


def test_every_beginning_of_a_pickle_is_refused() -> None:
    data = pickled(QuantizedWeight8bit(ARRAYS["I8"], np.ones((1, 4), np.float32)))
    read(data)
    for size in range(len(data)):
        refusal(data[:size])


@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(pickled(QuantizedWeight8bit(ARRAYS["I8"], np.ones((1, 4), np.float32))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole))
    except CheckpointError:
        return
    for array in (found.weight, found.scales):
        assert array is None or array.begin + array.num_bytes <= len(whole)


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    refusal(b"\x80\x04" + data)

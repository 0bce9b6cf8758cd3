"""`python tests/fuzz/atheris_codec.py -runs=200000`: the codec under a fuzzer that watches which code is reached.

Not part of the test suite: it needs the package atheris. Ends with an error, and the bytes in a file, if anything but
a message or InvalidRequest comes of some bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["grokmoe.tensors", "grokmoe.plan_codec"]):
    from grokmoe import tensors
    from grokmoe.errors import InvalidRequest
    from grokmoe.plan_codec import plan_from_proto, plan_to_proto
    from grokmoe.v1 import attention_pb2, expert_pb2

KINDS = (
    (expert_pb2.ForwardRequest, "request_id"),
    (expert_pb2.ForwardResponse, "request_id"),
    (attention_pb2.StepRequest, "step_id"),
    (attention_pb2.StepResponse, "step_id"),
)


def one(data: bytes) -> None:
    """First byte: the type of message, and where the rest is cut into two parts of one stream."""
    if not data:
        return
    kind, id_field = KINDS[data[0] % len(KINDS)]
    cut = data[0] // len(KINDS)
    assembler = tensors.RowAssembler(kind, id_field, max_rows=64)
    for part in (data[1 : 1 + cut], data[1 + cut :], data[1:]):
        try:
            whole = assembler.add(part)
            if whole is not None and isinstance(whole[0], attention_pb2.StepRequest):
                plan_to_proto(plan_from_proto(whole[0].plan))
        except InvalidRequest:
            pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()

"""The wire codec: the bytes protobuf would write, and every byte that is not what it should be refused."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe import tensors
from grokmoe.errors import InvalidRequest
from grokmoe.tensors import RowAssembler, decode, encode, encode_rows
from grokmoe.v1 import attention_pb2, expert_pb2, tensor_pb2

MIB = 2**20
Request = expert_pb2.ForwardRequest

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SHAPES = st.lists(st.integers(0, 300), max_size=3).filter(lambda shape: torch.Size(shape).numel() <= 3000)
UINT32 = st.integers(0, 2**32 - 1)
HEADERS = st.builds(
    Request,
    request_id=st.integers(0, 2**64 - 1),
    layer=UINT32,
    expert_ids=st.lists(UINT32, max_size=4),
    counts=st.lists(UINT32, max_size=4),
    remaining_rows=UINT32,
)


def some_tensor(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def as_proto(header: Any, tensor: torch.Tensor) -> Any:
    """The message with its payload as protobuf itself holds it."""
    whole = type(header)()
    whole.CopyFrom(header)
    dtype = tensors.wire_dtype(tensor.dtype)
    whole.payload.CopyFrom(tensor_pb2.Tensor(dtype=dtype, shape=tensor.shape, data=raw(tensor)))
    return whole


def with_payload(header: Any, payload: bytes) -> bytes:
    """A message whose payload field holds these bytes."""
    return header.SerializeToString() + bytes((15 << 3 | 2,)) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def tensor_bytes(dtype: int, shape: list[int], data: bytes) -> bytes:
    """A Tensor whose extents may be anything."""
    extents = b"".join(map(varint, shape))
    return b"\x08" + varint(dtype) + b"\x12" + varint(len(extents)) + extents + b"\x1a" + varint(len(data)) + data


@given(HEADERS, SHAPES, DTYPES)
def test_the_bytes_are_those_of_protobuf(header: Any, shape: list[int], dtype: torch.dtype) -> None:
    tensor = some_tensor(shape, dtype)
    data = encode(header, tensor)
    if tensor.numel() and shape:  # protobuf leaves out what is empty
        assert data == as_proto(header, tensor).SerializeToString()
    assert Request.FromString(data) == as_proto(header, tensor)
    found, payload = decode(Request, data)
    assert found == header
    assert payload is not None
    assert payload.dtype == dtype
    assert torch.equal(payload, tensor)


@given(HEADERS, SHAPES, DTYPES)
def test_what_protobuf_writes_can_be_read(header: Any, shape: list[int], dtype: torch.dtype) -> None:
    tensor = some_tensor(shape, dtype)
    found, payload = decode(Request, as_proto(header, tensor).SerializeToString())
    assert found == header
    assert payload is not None
    assert torch.equal(payload, tensor)


def test_a_message_without_payload() -> None:
    header = Request(request_id=7)
    assert encode(header) == header.SerializeToString()
    assert decode(Request, encode(header)) == (header, None)


def test_fields_in_other_orders_and_unknown_fields() -> None:
    data = raw(some_tensor([2, 3], torch.float32))
    unpacked_shape = b"\x10\x02\x10\x03"
    unknown = b"\xa0\x06\x05" + b"\xa2\x06\x02hi" + b"\xa5\x06abcd" + b"\xa1\x06abcdefgh"
    payload = unknown + b"\x1a" + varint(len(data)) + data + unpacked_shape + unknown + b"\x08\x01"
    message = with_payload(Request(), payload) + unknown + Request(request_id=9, layer=4).SerializeToString()
    header, tensor = decode(Request, message)
    assert (header.request_id, header.layer) == (9, 4)
    assert torch.equal(tensor, some_tensor([2, 3], torch.float32))
    assert Request.FromString(message).payload.shape == [2, 3], "protobuf reads it so, too"


def test_the_last_of_two_payloads_counts() -> None:
    one, two = (tensor_bytes(1, [1], raw(torch.tensor([value]))) for value in (1.0, 2.0))
    assert decode(Request, with_payload(Request(), one) + with_payload(Request(), two))[1] == 2.0


def test_reading_copies_nothing() -> None:
    data = encode(Request(request_id=1), some_tensor([64, 64], torch.float32))
    _, tensor = decode(Request, data)
    begin = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    assert tensor is not None
    assert begin < tensor.data_ptr()
    assert tensor.data_ptr() + tensor.nbytes == begin + len(data)


def test_what_is_not_contiguous_is_written_in_order() -> None:
    tensor = some_tensor([4, 6], torch.bfloat16).t()[1:]
    assert torch.equal(decode(Request, encode(Request(), tensor))[1], tensor)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (tensor_bytes(0, [1], bytes(4)), "payload.dtype"),
        (tensor_bytes(99, [1], bytes(4)), "payload.dtype"),
        (tensor_bytes(1, [2], bytes(4)), "payload.data"),
        (tensor_bytes(2, [2], bytes(5)), "payload.data"),
        (tensor_bytes(1, [], b""), "payload.data"),
        (tensor_bytes(1, [2**31, 2**31], bytes(8)), "payload.data"),
        (tensor_bytes(1, [2**32, 2], b""), "payload.shape"),
        (tensor_bytes(1, [0, 2**64], b""), "payload.shape"),
        (tensor_bytes(1, [0, 2**32 - 1, 2**32 - 1, 2**32 - 1], b""), "payload"),
        (tensor_bytes(1, [1] * 9, bytes(4)), "payload.shape"),
        (tensor_bytes(1, [2**31] * 100_000, bytes(4)), "payload.shape"),
        (b"\x08\x01" + b"\x10\x01" * 9 + b"\x1a\x04abcd", "payload.shape"),
        (b"\x08", "payload"),
        (b"\x1a\x7f\x00", "payload"),
        (b"\x0b", "payload"),
        (b"\x00\x00", "payload"),
        (b"\x08" + b"\xff" * 11, "payload"),
    ],
)
def test_a_malformed_tensor_names_its_field(payload: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(Request, with_payload(Request(request_id=3), payload))
    assert caught.value.field == field
    assert len(caught.value.message) < 300


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        decode(Request, data)
    with contextlib.suppress(InvalidRequest):
        decode(Request, with_payload(Request(), data))


GOOD = encode(Request(request_id=5, expert_ids=[1, 2], counts=[1, 2]), some_tensor([3, 4], torch.float32))


@given(st.data())
def test_damaged_messages_are_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(GOOD[: data.draw(st.integers(0, len(GOOD)), "length")])
    for _ in range(data.draw(st.integers(0, 3), "flips") if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1), "at")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    assembler = RowAssembler(Request, "request_id", max_rows=1000, width=4)
    with contextlib.suppress(InvalidRequest):
        decode(Request, bytes(damaged))
    with contextlib.suppress(InvalidRequest):
        assembler.add(bytes(damaged))


def test_a_small_message_does_not_allocate_much() -> None:
    hostile = with_payload(Request(), tensor_bytes(1, [2**31, 2**31], bytes(4)))
    many_extents = with_payload(Request(), tensor_bytes(1, [1] * MIB, bytes(4)))
    tracemalloc.start()
    try:
        for message in (hostile, many_extents):
            with pytest.raises(InvalidRequest):
                decode(Request, message)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


@settings(max_examples=50)
@given(st.data(), DTYPES)
def test_what_was_cut_is_joined_again(data: st.DataObject, dtype: torch.dtype) -> None:
    """Several requests, cut into parts of random size, their parts in any order between requests."""
    assembler = RowAssembler(Request, "request_id", max_rows=20)
    wholes, queues = {}, {}
    for request_id in range(data.draw(st.integers(1, 4), "requests")):
        rows_ND = some_tensor([data.draw(st.integers(0, 20), "rows"), 5], dtype) + request_id
        header = Request(request_id=request_id, layer=request_id, expert_ids=[1], counts=[len(rows_ND)])
        wholes[request_id] = rows_ND
        max_bytes = data.draw(st.integers(1, 200), "max_bytes")
        queues[request_id] = list(encode_rows(header, rows_ND, "request_id", max_bytes))
        if len(rows_ND) * 5 * dtype.itemsize > max_bytes > 5 * dtype.itemsize:
            assert len(queues[request_id]) > 1
    while queues:
        request_id = data.draw(st.sampled_from(sorted(queues)), "next")
        whole = assembler.add(queues[request_id].pop(0))
        assert (whole is None) == bool(queues[request_id])
        if whole is not None:
            del queues[request_id]
            assert (whole[0].request_id, whole[0].layer) == (request_id, request_id)
            assert whole[1] is not None
            assert torch.equal(whole[1], wholes[request_id])


def part(
    num_rows: int, remaining: int, width: int = 4, request_id: int = 1, dtype: torch.dtype = torch.float32
) -> bytes:
    return encode(Request(request_id=request_id, remaining_rows=remaining), torch.ones(num_rows, width, dtype=dtype))


class TestRowAssembler:
    def assembler(self) -> RowAssembler[Any]:
        return RowAssembler(Request, "request_id", max_rows=10, width=4)

    @pytest.mark.parametrize(
        ("messages", "field"),
        [
            ([part(1, 10)], "remaining_rows"),
            ([part(1, 2**32 - 1)], "remaining_rows"),
            ([part(1, 2, width=5)], "payload.shape"),
            ([part(0, 2)], "payload"),
            ([Request(request_id=1, remaining_rows=1).SerializeToString()], "payload"),
            ([part(2, 2), part(1, 2)], "remaining_rows"),
            ([part(2, 2), part(3, 0)], "remaining_rows"),
            ([part(2, 2), part(2, 0, width=3)], "payload"),
            ([part(2, 2), part(2, 0, dtype=torch.bfloat16)], "payload"),
            ([part(2, 2), Request(request_id=1).SerializeToString()], "payload"),
        ],
    )
    def test_parts_that_do_not_fit_are_refused(self, messages: list[bytes], field: str) -> None:
        assembler = self.assembler()
        for message in messages[:-1]:
            assert assembler.add(message) is None
        with pytest.raises(InvalidRequest) as caught:
            assembler.add(messages[-1])
        assert caught.value.field == field
        assert assembler.failed_id == 1
        whole = assembler.add(part(1, 0, request_id=2))
        assert whole is not None, "others go on"

    def test_later_parts_of_what_was_refused_are_passed_over(self) -> None:
        assembler = self.assembler()
        with pytest.raises(InvalidRequest):
            assembler.add(part(8, 8))
        assert assembler.add(part(4, 4)) is None
        assert assembler.add(part(4, 0)) is None
        assert assembler.add(part(3, 0)) is not None, "the id can be used again"

    def test_id_zero_is_an_id(self) -> None:
        assembler = self.assembler()
        with pytest.raises(InvalidRequest):
            assembler.add(part(8, 8, request_id=0))
        assert assembler.failed_id == 0

    def test_bytes_that_are_no_message_have_no_id(self) -> None:
        assembler = self.assembler()
        with pytest.raises(InvalidRequest):
            assembler.add(b"\xff\xff")
        assert assembler.failed_id is None

    def test_unfinished_requests_are_bounded(self) -> None:
        assembler = self.assembler()
        for request_id in range(1, tensors.MAX_UNFINISHED + 2):
            assert assembler.add(part(1, 1, request_id=request_id)) is None
        whole = assembler.add(part(1, 0, request_id=2))
        assert whole is not None
        assert whole[1].shape == (2, 4)
        dropped = assembler.add(part(1, 0, request_id=1))
        assert dropped is not None
        assert dropped[1].shape == (1, 4), "the oldest was forgotten: this looks like a request of one row"

    def test_the_same_for_other_messages(self) -> None:
        assembler = RowAssembler(attention_pb2.StepResponse, "step_id", max_rows=100)
        header = attention_pb2.StepResponse(step_id=3, result=attention_pb2.StepResult(token_ids=[1, 2]))
        logits_RV = some_tensor([7, 10], torch.float32)
        *firsts, last = encode_rows(header, logits_RV, "step_id", max_bytes=100)
        assert [assembler.add(message) for message in firsts] == [None] * len(firsts)
        whole = assembler.add(last)
        assert whole is not None
        assert list(whole[0].result.token_ids) == [1, 2]
        assert torch.equal(whole[1], logits_RV)


def test_a_type_without_codec() -> None:
    with pytest.raises(KeyError):
        encode(Request(), torch.zeros(1, dtype=torch.float64))

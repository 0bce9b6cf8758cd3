"""What the harness measures of a server that answers at known times."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from grokmoe import AsyncClient, InvalidRequest, Reason, ResourceExhausted
from grokmoe.channel import open_channel
from grokmoe.v1 import generation_pb2 as pb
from grokmoe.v1 import generation_pb2_grpc
from loadtest import latencies
from loadtest.arrivals import constant_times
from loadtest.job import Job
from loadtest.planned import Input, PlannedRequest, plan_requests
from loadtest.record import Outcome, RequestRecord
from loadtest.sender import Sender
from tests.loadtest import echo
from tests.loadtest.echo import Echo

PROMPT = (5, 6, 7)


def job(address: str, **changes) -> Job:
    return Job(**{"address": address, "client": {"retries": 0}, "sampling": {}, "request_id_prefix": "t-", **changes})


def evenly(num: int, rate: float, max_tokens: int = 4) -> list[PlannedRequest]:
    return plan_requests([Input(PROMPT, max_tokens)] * num, constant_times(num, rate))


async def send(
    address: str, plan, is_closed: bool = False, begin: float | None = None, **changes
) -> list[RequestRecord]:
    async with AsyncClient(address, retries=0) as client:
        await client.model()
        sender = Sender(client, job(address, **changes))
        begin = time.monotonic() + 0.05 if begin is None else begin
        return await (sender.run_closed if is_closed else sender.run)(plan, begin)


NUM_PAIRS, MOST_ROUNDS = 40, 8


def test_the_harness_adds_less_than_a_millisecond() -> None:
    """Requests in turn by a bare stub and by the harness: 20 ms to the first token, 10 ms to each further one.

    The two share whatever the machine is doing; what harness and SDK add is the difference of the medians. Where other
    work is heavy that difference is noise of its own, so there are several rounds: what the harness adds is in all.
    """

    async def bare(stub, request) -> tuple[float, float, float]:
        begin = time.monotonic()
        stamps = [time.monotonic() async for _ in stub.StreamGenerate(request)]
        return stamps[0] - begin, stamps[-1] - begin, (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    async def ours(sender: Sender) -> tuple[float, float, float]:
        (record,) = await sender.run([PlannedRequest(0, 0.0, PROMPT, 5)], time.monotonic())
        assert latencies.ttft(record) >= 0.02
        return latencies.ttft(record), latencies.e2el(record), latencies.tpot(record)

    async def main() -> list[list[float]]:
        rounds = []
        async with echo.process(0.02, 0.01) as address, AsyncClient(address) as client:
            channel = open_channel(address)
            stub = generation_pb2_grpc.GenerationStub(channel)
            request = pb.StreamGenerateRequest()
            request.generate.token_ids.ids.extend(PROMPT)
            request.generate.stopping.max_tokens = 5
            sender = Sender(client, job(address))
            while len(rounds) < MOST_ROUNDS and (not rounds or max(rounds[-1]) >= 0.001):
                pairs = [(await bare(stub, request), await ours(sender)) for _ in range(NUM_PAIRS)]
                theirs, mine = (map(statistics.median, zip(*side, strict=True)) for side in zip(*pairs, strict=True))
                rounds.append([abs(one - other) for one, other in zip(theirs, mine, strict=True)])
            await channel.close(None)
        return rounds

    rounds = asyncio.run(main())
    assert max(rounds[-1]) < 0.001, rounds


def test_a_stall_is_seen_by_every_request_that_was_due_in_it() -> None:
    """The server stands still for a second in the middle of 2 s at 50 requests/s. No request waits for another."""

    async def main() -> tuple[list[RequestRecord], float, float]:
        server = Echo()
        async with echo.serving(server) as address:
            begin = time.monotonic() + 0.1
            sending = asyncio.create_task(send(address, evenly(100, 50.0), begin=begin))
            while len(server.names) < 25:  # noqa: ASYNC110 - a count has no event
                await asyncio.sleep(0.001)
            server.stall(1.0)
            return await sending, server.stalls_until - 1.0 - begin, server.stalls_until - begin

    records, stall, over = asyncio.run(main())
    assert all(record.outcome is Outcome.COMPLETED for record in records)
    due = [record for record in records if stall < record.scheduled < over]
    assert 45 <= len(due) <= 51
    # To the microsecond, however busy the machine: none can have had a token before the stall was over.
    assert all(latencies.ttft(record) >= over - record.scheduled for record in due)
    assert statistics.mean(map(latencies.ttft, due)) >= 0.45


def test_a_closed_loop_hides_the_same_stall() -> None:
    """Why the open loop is the default: of one client in turn, one request is late."""

    async def main() -> list[RequestRecord]:
        server = Echo(first=0.02)
        async with echo.serving(server) as address:
            plan = plan_requests([Input(PROMPT, 1)] * 50, constant_times(50, 1e9))
            sending = asyncio.create_task(send(address, plan, is_closed=True, concurrency=1))
            while len(server.names) < 20:  # noqa: ASYNC110 - a count has no event
                await asyncio.sleep(0.001)
            server.stall(1.0)
            return await sending

    assert sum(latencies.ttft(record) > 0.5 for record in asyncio.run(main())) == 1


def test_what_waits_for_its_turn_counts_from_when_it_was_due() -> None:
    """One at a time, 50 ms each, all due at once: the k-th has waited for k - 1 others."""

    async def main() -> list[RequestRecord]:
        async with echo.serving(Echo(first=0.05)) as address:
            return await send(address, plan_requests([Input(PROMPT, 1)] * 5, constant_times(5, 1e9)), concurrency=1)

    for index, record in enumerate(asyncio.run(main())):
        assert latencies.ttft(record) >= 0.05 * (index + 1) - 0.01
        assert latencies.ttft_sent(record) < latencies.ttft(record) - 0.05 * index + 0.01
        assert latencies.client_queue_time(record) >= 0.05 * index - 0.01


def test_a_closed_loop_keeps_as_many_under_way_as_it_has_clients() -> None:
    async def main() -> tuple[list[RequestRecord], Echo]:
        server = Echo(first=0.02)
        async with echo.serving(server) as address:
            plan = plan_requests([Input(PROMPT, 1)] * 30, constant_times(30, 1e9))
            return await send(address, plan, is_closed=True, concurrency=3), server

    records, server = asyncio.run(main())
    assert len(records) == len(set(server.names)) == 30
    starts = sorted((record.sent, 1) for record in records)
    changes = sorted([*starts, *((record.end, -1) for record in records)])
    level = most = 0
    for _, change in changes:
        level += change
        most = max(most, level)
    assert most == 3


def test_errors_are_counted_by_code_and_reason_and_not_tried_again() -> None:
    def refuse(name: str):
        if name == "t-1":
            return ResourceExhausted("full", 0.01, reason=Reason.QUEUE_FULL)
        return InvalidRequest("sampling.top_p", "wrong") if name == "t-2" else None

    async def main() -> tuple[list[RequestRecord], Echo]:
        server = Echo(error_of=refuse)
        async with echo.serving(server) as address:
            return await send(address, evenly(4, 100.0)), server

    records, server = asyncio.run(main())
    assert [record.outcome.value for record in records] == ["completed", "failed", "failed", "completed"]
    assert (records[1].code, records[1].reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert (records[2].code, records[2].reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert len(server.names) == 4


def test_a_prompt_that_no_message_can_carry_fails_alone() -> None:
    async def main() -> list[RequestRecord]:
        async with echo.serving(Echo()) as address:
            plan = [PlannedRequest(0, 0.0, (-1,), 4), PlannedRequest(1, 0.0, PROMPT, 4)]
            return await send(address, plan)

    first, second = asyncio.run(main())
    assert (first.outcome, first.code) == (Outcome.FAILED, "INVALID_ARGUMENT")
    assert second.outcome is Outcome.COMPLETED


def test_streams_are_left_where_the_plan_says() -> None:
    async def main() -> tuple[list[RequestRecord], Echo]:
        server = Echo(gap=0.01)
        async with echo.serving(server) as address:
            records = await send(address, [PlannedRequest(0, 0.0, PROMPT, 1000, 3)])
            async with asyncio.timeout(30):
                while not server.num_left:  # noqa: ASYNC110 - a count has no event
                    await asyncio.sleep(0.002)
            return records, server

    (record,), server = asyncio.run(main())
    assert (record.outcome, record.output_len) == (Outcome.CANCELLED, 3)
    assert latencies.cancel(record) == pytest.approx(record.arrivals[-1] - record.sent, abs=0.1)
    assert server.num_left == 1


def test_what_is_not_done_in_time_is_cut_off() -> None:
    async def main() -> list[RequestRecord]:
        async with echo.serving(Echo(gap=30.0)) as address:
            return await send(address, evenly(3, 100.0), drain_seconds=0.3)

    begin = time.monotonic()
    records = asyncio.run(main())
    assert time.monotonic() - begin < 15
    assert [record.outcome for record in records] == [Outcome.INCOMPLETE] * 3
    assert [record.output_len for record in records] == [1] * 3


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_no_server_can_cause_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, is_closed: bool) -> None:
    async def main() -> None:
        async with echo.serving(Echo()) as address:
            await send(address, [PlannedRequest(0, 0.0, PROMPT, 4)], is_closed, concurrency=1 if is_closed else None)

    monkeypatch.setattr("loadtest.sender.hashlib.blake2b", lambda **_: None)
    with pytest.raises(AttributeError):
        asyncio.run(main())


def test_equal_tokens_have_equal_digests() -> None:
    async def main() -> list[RequestRecord]:
        async with echo.serving(Echo()) as address:
            return await send(address, [PlannedRequest(index, 0.0, PROMPT, 4 + index // 2) for index in range(4)])

    digests = [record.digest for record in asyncio.run(main())]
    assert digests[0] == digests[1] != digests[2] == digests[3]

"""What a request can ask for, through the service over real attention and experts: each feature against the logits of
the goldens or against what the tokens themselves say. All of it from one attention worker and from a pipeline of them.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from grokmoe.v1 import control_pb2
from grokmoe.v1 import generation_pb2 as pb
from tests import goldens
from tests.router import served
from tests.router.pipelines import faulty_stages, pipeline
from tests.router.served import TOKENIZER, Served, service
from tests.router.tiny import CONFIG, RestartingAttention, golden_tokens, until

PROMPT = "len33"
IDS = goldens.PROMPTS[PROMPT]


@pytest.fixture(autouse=True, params=["one worker", "a pipeline"])
def _attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a pipeline":
        monkeypatch.setattr(served, "attention_link", lambda: pipeline(*faulty_stages((0, 1, 2, 3))))


def request(**parts: Any) -> pb.GenerateRequest:
    """Greedy, 16 tokens, len33, unless the parts say otherwise; a part is a dict of the message's fields."""
    parts.setdefault("sampling", {})
    parts.setdefault("stopping", {})
    prompt = {} if "text" in parts else {"token_ids": pb.TokenIds(ids=IDS)}
    return pb.GenerateRequest(
        sampling=pb.SamplingParams(**{"temperature": 0, **parts.pop("sampling")}),
        stopping=pb.StoppingParams(**{"max_tokens": 16, "ignore_eos": True, **parts.pop("stopping")}),
        **prompt,
        **{key: value for key, value in parts.items() if not isinstance(value, dict)},
        **{key: _MESSAGES[key](**value) for key, value in parts.items() if isinstance(value, dict)},
    )


_MESSAGES: dict[str, Any] = {
    "response": pb.ResponseOptions,
    "tokenize": pb.TokenizeOptions,
    "structured": pb.StructuredOutput,
}


async def ask(served: Served, **parts: Any) -> pb.Candidate:
    """The answer's one candidate; streaming gives the same."""
    asked = request(**parts)
    answer = await served.stub.Generate(asked)
    (candidate,) = answer.candidates
    stream = [part async for part in served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=asked))]
    assert "".join(part.text_delta for part in stream) == candidate.text
    assert [id_ for part in stream for id_ in part.token_ids] == candidate.token_ids
    assert_same_rows([row for part in stream for row in part.logprobs], candidate.logprobs)
    assert_same_rows([row for part in stream for row in part.prompt_logprobs], answer.prompt_logprobs)
    assert stream[-1].finish_reason == candidate.finish_reason
    assert stream[-1].WhichOneof("stopped_by") == candidate.WhichOneof("stopped_by")
    assert answer.usage.completion_tokens == stream[-1].usage.completion_tokens == len(candidate.token_ids)
    return candidate


def assert_same_rows(some: Any, others: Any) -> None:
    """The same tokens, and log-probabilities that differ by the rounding of another batch at most."""
    for one, other in zip(some, others, strict=True):
        assert (one.token_id, one.rank, one.top_token_ids) == (other.token_id, other.rank, other.top_token_ids)
        assert (one.logprob, *one.top_logprobs) == pytest.approx((other.logprob, *other.top_logprobs), abs=1e-4)


def run(test: Any, **options: Any) -> None:
    async def main() -> None:
        async with service(**options) as served:
            await test(served)
            await until(lambda: served.engine.num_running + served.engine.num_waiting == 0)
            await until(lambda: served.engine.cells[0].scheduler.ledger.num_used == 0)

    asyncio.run(main())


class TestSampling:
    def test_bias_bars_and_forces(self) -> None:
        async def test(served: Served) -> None:
            golden = golden_tokens(PROMPT)
            barred = (await ask(served, sampling={"logit_bias": {golden[0]: -100.0}})).token_ids
            assert barred[0] == goldens.logits("seed", PROMPT)[len(IDS) - 1].topk(2).indices[1]
            forced = (await ask(served, sampling={"logit_bias": {7: 100.0}})).token_ids
            assert list(forced) == [7] * 16

        run(test)

    def test_presence_and_frequency_count_the_output(self) -> None:
        async def test(served: Served) -> None:
            free = await ask(served, response={"logprobs": -1})
            first, second = free.token_ids[:2]
            assert first != second
            row = free.logprobs[1].top_logprobs
            # With this bias the first token leads by 1 at the second place, too.
            bias = {"logit_bias": {first: row[second] - row[first] + 1.0}}

            async def second_token(**penalty: float) -> int:
                return (await ask(served, sampling={**bias, **penalty})).token_ids[1]

            assert await second_token() == first
            assert await second_token(presence_penalty=2.0) == second
            assert await second_token(frequency_penalty=0.5) == first
            assert await second_token(frequency_penalty=2.0) == second
            assert await second_token(presence_penalty=0.75, frequency_penalty=0.5) == second

        run(test)

    def test_the_repetition_penalty_counts_the_prompt(self) -> None:
        async def test(served: Served) -> None:
            logits_V = goldens.logits("seed", PROMPT)[len(IDS) - 1].clone()
            for token_id in set(IDS):
                logits_V[token_id] = logits_V[token_id] / 4 if logits_V[token_id] > 0 else logits_V[token_id] * 4
            # One of the prompt's tokens leads by a bias, and loses its lead to the penalty.
            leader = IDS[3]
            bias = {leader: float(goldens.logits("seed", PROMPT)[len(IDS) - 1].max()) + 5.0}
            assert (await ask(served, sampling={"logit_bias": bias})).token_ids[0] == leader
            raw = goldens.logits("seed", PROMPT)[len(IDS) - 1, leader] + bias[leader]
            logits_V[leader] = raw / 4
            expected = int(logits_V.argmax())
            assert expected != leader
            penalised = await ask(served, sampling={"logit_bias": bias, "repetition_penalty": 4.0})
            assert penalised.token_ids[0] == expected

        run(test)

    def test_min_p_of_one_is_greedy_at_any_temperature(self) -> None:
        async def test(served: Served) -> None:
            drawn = await ask(served, sampling={"temperature": 5.0, "min_p": 1.0, "seed": 3})
            assert list(drawn.token_ids) == golden_tokens(PROMPT)

        run(test)

    def test_candidates_share_a_prompt_and_differ(self) -> None:
        async def test(served: Served) -> None:
            asked = request(sampling={"temperature": 1.0, "seed": 5, "n": 3})
            answer = await served.stub.Generate(asked)
            assert [candidate.index for candidate in answer.candidates] == [0, 1, 2]
            assert len({tuple(candidate.token_ids) for candidate in answer.candidates}) == 3
            assert answer.usage.completion_tokens == 48
            parts = [part async for part in served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=asked))]
            for candidate in answer.candidates:
                own = [part for part in parts if part.index == candidate.index]
                assert [id_ for part in own for id_ in part.token_ids] == candidate.token_ids
                assert own[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert [part.HasField("timing") for part in parts] == [False] * (len(parts) - 1) + [True]
            (alone,) = (await served.stub.Generate(request(sampling={"temperature": 1.0, "seed": 5}))).candidates
            assert alone.token_ids == answer.candidates[0].token_ids

        run(test)

    def test_a_lost_worker_changes_nothing_of_it_all(self) -> None:
        parts: dict[str, Any] = {
            "sampling": {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "min_p": 0.01, "top_k": 50},
            "response": {"logprobs": 2, "prompt_logprobs": 1},
            "stopping": {"min_tokens": 3},
        }
        answers = []
        for dies_at in ([], [0, 3, 9]):

            async def test(served: Served) -> None:
                answers.append(await served.stub.Generate(request(**parts)))

            run(test, attention=RestartingAttention(dies_at))
        first, second = answers
        assert first.candidates[0].token_ids == second.candidates[0].token_ids
        assert_same_rows(first.prompt_logprobs, second.prompt_logprobs)
        assert_same_rows(first.candidates[0].logprobs, second.candidates[0].logprobs)


def expected_logprobs() -> torch.Tensor:
    return goldens.logits("seed", PROMPT).log_softmax(-1)


class TestLogprobs:
    def test_of_the_output(self) -> None:
        async def test(served: Served) -> None:
            candidate = await ask(served, response={"logprobs": 3})
            assert [row.token_id for row in candidate.logprobs] == candidate.token_ids
            first, top = candidate.logprobs[0], expected_logprobs()[len(IDS) - 1].topk(3)
            assert (first.rank, list(first.top_token_ids)) == (1, top.indices.tolist())
            assert list(first.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-3)
            assert first.logprob == first.top_logprobs[0]
            biased = await ask(served, response={"logprobs": 0}, sampling={"logit_bias": {7: 100.0}})
            row = biased.logprobs[0]
            assert row.logprob == pytest.approx(expected_logprobs()[len(IDS) - 1, 7].item(), abs=1e-3), (
                "before the bias"
            )
            assert row.rank > 1
            assert not row.top_token_ids

        run(test)

    @pytest.mark.parametrize("max_step_tokens", [512, 10])
    def test_of_the_prompt(self, max_step_tokens: int) -> None:
        async def test(served: Served) -> None:
            await served.stub.Generate(request())  # fills the prefix cache, which must not be used
            answer = await served.stub.Generate(request(response={"prompt_logprobs": 2}))
            rows, expected = answer.prompt_logprobs, expected_logprobs()
            assert [row.token_id for row in rows] == list(IDS)
            assert not rows[0].HasField("logprob")
            for position, row in enumerate(rows[1:]):
                assert row.logprob == pytest.approx(expected[position, row.token_id].item(), abs=1e-3)
                assert row.rank == (expected[position] >= expected[position, row.token_id]).sum()
                assert list(row.top_token_ids) == expected[position].topk(2).indices.tolist()
            assert answer.usage.cached_tokens == 0
            assert list(answer.candidates[0].token_ids) == golden_tokens(PROMPT)

        run(test, max_step_tokens=max_step_tokens)

    def test_of_the_whole_vocabulary(self) -> None:
        async def test(served: Served) -> None:
            answer = await served.stub.Generate(request(response={"logprobs": -1, "prompt_logprobs": -1}))
            expected = expected_logprobs()
            for position, row in enumerate(answer.prompt_logprobs[1:]):
                assert not row.top_token_ids
                assert torch.tensor(row.top_logprobs).sub(expected[position]).abs().max() < 1e-3
            for row in answer.candidates[0].logprobs:
                assert len(row.top_logprobs) == CONFIG.vocab_size
                assert row.logprob == max(row.top_logprobs)

        run(test)

    def test_score_is_the_prompts_logprobs(self) -> None:
        async def test(served: Served) -> None:
            scored = await served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=IDS), top_logprobs=2))
            answer = await served.stub.Generate(request(response={"prompt_logprobs": 2}))
            assert [row.token_id for row in scored.logprobs] == list(IDS)
            for ours, theirs in zip(scored.logprobs, answer.prompt_logprobs, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert scored.total_logprob == pytest.approx(sum(row.logprob for row in scored.logprobs[1:]))
            assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (33, 0)
            text = await served.stub.Score(pb.ScoreRequest(text="hello"))
            assert [row.token_id for row in text.logprobs] == TOKENIZER.encode("hello")

        run(test)


class TestText:
    def test_stop_strings(self) -> None:
        async def test(served: Served) -> None:
            whole = await ask(served)
            text = whole.text
            stop = text[5:9]
            at = text.index(stop)
            cut = await ask(served, stopping={"stop_strings": ["never there", stop]})
            assert (cut.text, cut.finish_reason, cut.stop_string) == (text[:at], pb.FINISH_REASON_STOP, stop)
            assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
            assert len(cut.token_ids) < 16
            kept = await ask(served, stopping={"stop_strings": [stop], "include_stop_string": True})
            assert kept.text == text[: at + len(stop)]
            silent = await ask(served, stopping={"stop_strings": [stop]}, response={"text": False, "logprobs": 0})
            assert (silent.text, silent.token_ids) == ("", cut.token_ids)
            assert len(silent.logprobs) == len(cut.token_ids)
            late = await ask(served, stopping={"stop_strings": [stop], "min_tokens": 16})
            assert (late.text, late.finish_reason) == (text, pb.FINISH_REASON_LENGTH)

        run(test)

    def test_one_of_two_candidates_stops(self) -> None:
        async def test(served: Served) -> None:
            asked = request(sampling={"temperature": 1.0, "seed": 5, "n": 2}, stopping={"max_tokens": 40})
            first, second = (await served.stub.Generate(asked)).candidates
            stop = next(first.text[at : at + 2] for at in range(60) if first.text[at : at + 2] not in second.text)
            asked.stopping.stop_strings.append(stop)
            stopped, whole = (await served.stub.Generate(asked)).candidates
            assert (stopped.stop_string, stopped.finish_reason) == (stop, pb.FINISH_REASON_STOP)
            assert (whole.text, whole.finish_reason) == (second.text, pb.FINISH_REASON_LENGTH)

        run(test)

    def test_min_tokens_keep_stop_tokens_away(self) -> None:
        async def test(served: Served) -> None:
            golden = golden_tokens(PROMPT)
            stopping = {"stop_token_ids": [golden[1]]}
            short = await ask(served, stopping=stopping)
            assert (list(short.token_ids), short.stop_token_id) == (golden[:2], golden[1])
            long = await ask(served, stopping={**stopping, "min_tokens": 5})
            assert golden[1] not in long.token_ids[:5]
            assert len(long.token_ids) >= 5

        run(test)

    def test_echo_and_special_tokens(self) -> None:
        async def test(served: Served) -> None:
            plain = await ask(served, text="né!")
            echoed = await ask(served, text="né!", response={"echo": True})
            assert echoed.text == "né!" + plain.text
            assert echoed.token_ids == plain.token_ids
            eos = {"logit_bias": {2: 100.0}}
            assert (await ask(served, sampling=eos)).text == ""
            shown = await ask(served, sampling=eos, response={"skip_special_tokens": False})
            assert shown.text == "</s>" * 16

        run(test)

    def test_tokenize_and_back(self) -> None:
        async def test(served: Served) -> None:
            tokens = await served.stub.Tokenize(pb.TokenizeRequest(text="né", options=pb.TokenizeOptions(add_bos=True)))
            assert list(tokens.token_ids) == [CONFIG.bos_token_id, *TOKENIZER.encode("né")]
            assert tokens.pieces[:2] == ["<s>", "n"]
            text = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
            assert text.text == "né"
            text = await served.stub.Detokenize(
                pb.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=False)
            )
            assert text.text == "<s>né"
            assert not (await served.stub.Tokenize(pb.TokenizeRequest())).token_ids
            with pytest.raises(grpc.aio.AioRpcError, match="512"):
                await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[512]))

        run(test)


class TestStructuredOutput:
    @pytest.mark.parametrize("temperature", [0.0, 1.5])
    def test_each_format(self, temperature: float) -> None:
        schema = json.dumps(
            {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
        )

        async def test(served: Served) -> None:
            async def text_of(**fields: Any) -> str:
                candidate = await ask(
                    served,
                    text="x",
                    structured=fields,
                    sampling={"temperature": temperature, "seed": 1},
                    stopping={"max_tokens": 200, "ignore_eos": False},
                )
                assert candidate.finish_reason == pb.FINISH_REASON_STOP
                return candidate.text

            assert json.loads(await text_of(json_schema=schema)) in ({"a": 1}, {"a": 2})
            assert re.fullmatch("[ab]{3}-[0-9]{2}", await text_of(regex="[ab]{3}-[0-9]{2}"))
            assert await text_of(choice=pb.Choices(choices=["yes", "yesterday", "no"])) in ("yes", "yesterday", "no")
            assert re.fullmatch("(ab)+c", await text_of(grammar='start: ("ab")~1..3 "c"'))

        run(test)

    def test_without_an_end_of_sequence_id_it_ends_when_complete(self) -> None:
        async def test(served: Served) -> None:
            candidate = await ask(served, structured={"regex": "abc"}, stopping={"ignore_eos": False})
            assert (candidate.text, candidate.finish_reason) == ("abc", pb.FINISH_REASON_STOP)
            assert candidate.WhichOneof("stopped_by") is None

        run(test, model={"eos_token_ids": ()})

    def test_logprobs_are_over_what_is_allowed(self) -> None:
        async def test(served: Served) -> None:
            parts: dict[str, Any] = {"structured": {"regex": "[ab]"}, "stopping": {"ignore_eos": False}}
            row = (await ask(served, **parts, response={"logprobs": 2})).logprobs[0]
            allowed = [TOKENIZER.encode(letter)[0] for letter in "ab"]
            assert set(row.top_token_ids) == set(allowed)
            expected = goldens.logits("seed", PROMPT)[len(IDS) - 1][allowed].log_softmax(-1).sort(descending=True)
            assert list(row.top_logprobs) == pytest.approx(expected.values.tolist(), abs=1e-3)

        run(test)


class TestResumption:
    @pytest.mark.parametrize(
        "parts",
        [
            {},
            {"sampling": {"temperature": 1.0, "seed": 9, "repetition_penalty": 1.4, "frequency_penalty": 0.3}},
            {"stopping": {"min_tokens": 9, "stop_strings": ["zzz"]}},
            {
                "structured": {"regex": "[a-f]{12}"},
                "sampling": {"temperature": 1.0, "seed": 9},
                "stopping": {"ignore_eos": False},
            },
        ],
    )
    def test_it_goes_on_as_if_it_had_not_ended(self, parts: dict[str, Any]) -> None:
        async def test(served: Served) -> None:
            asked = request(**{key: dict(value) for key, value in parts.items()})
            whole = [part async for part in served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=asked))]
            for cut in range(1, len(whole)):
                received = [id_ for part in whole[:cut] for id_ in part.token_ids]
                if len(received) >= sum(len(part.token_ids) for part in whole):
                    continue
                again = request(**{key: dict(value) for key, value in parts.items()})
                again.resumed.ids.extend(received)
                rest = [part async for part in served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=again))]
                ids = received + [id_ for part in rest for id_ in part.token_ids]
                assert ids == [id_ for part in whole for id_ in part.token_ids]
                text = "".join(part.text_delta for part in (*whole[:cut], *rest))
                assert text == "".join(part.text_delta for part in whole)
                assert rest[-1].usage == whole[-1].usage or rest[-1].usage.completion_tokens == len(ids)
                assert rest[-1].finish_reason == whole[-1].finish_reason

        run(test)

    @pytest.mark.parametrize(
        ("parts", "complaint"),
        [
            ({"sampling": {"temperature": 1.0}}, "needs sampling.seed"),
            ({"sampling": {"n": 2}}, "sampling.n is above 1"),
            ({"response": {"echo": True}}, "response.echo"),
            ({"response": {"prompt_logprobs": 0}}, "response.prompt_logprobs"),
            ({"stopping": {"max_tokens": 2}}, "allow 1"),
            ({"stopping": {"stop_token_ids": [5]}}, "complete already"),
            ({"structured": {"regex": "abc"}, "stopping": {"ignore_eos": False}}, "does not allow"),
        ],
    )
    def test_what_cannot_be_resumed(self, parts: dict[str, Any], complaint: str) -> None:
        async def test(served: Served) -> None:
            asked = request(**parts)
            asked.resumed.ids.extend([4, 5])
            with pytest.raises(grpc.aio.AioRpcError, match=complaint):
                await served.stub.Generate(asked)

        run(test)

    def test_a_stop_string_in_what_was_received(self) -> None:
        async def test(served: Served) -> None:
            whole = await ask(served)
            asked = request(stopping={"stop_strings": [whole.text[1:3]]})
            asked.resumed.ids.extend(whole.token_ids[:10])
            with pytest.raises(grpc.aio.AioRpcError, match="complete already: it holds a stop string"):
                await served.stub.Generate(asked)

        run(test)


class TestControl:
    def test_a_duplicate_of_a_live_id_is_refused(self) -> None:
        async def test(served: Served) -> None:
            asked = request(request_id="mine", stopping={"max_tokens": 300})
            stream = served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=asked))
            await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.stub.Generate(asked)
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            info = error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in rpc_status.from_call(caught.value).details)
            assert (info.reason, info.domain) == ("DUPLICATE_REQUEST_ID", "grokmoe")
            stream.cancel()
            await until(lambda: served.engine.num_running == 0)
            assert (await served.stub.Generate(request(request_id="mine"))).request_id == "mine"

        run(test)

    def test_abort(self) -> None:
        async def test(served: Served) -> None:
            asked = request(request_id="long", stopping={"max_tokens": 400})
            stream = served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=asked))
            messages = aiter(stream)
            first = await anext(messages)
            reply = await served.control.Abort(control_pb2.AbortRequest(request_ids=["never was", "long"]))
            assert list(reply.aborted_ids) == ["long"]
            parts = [first, *[part async for part in messages]]
            assert parts[-1].finish_reason == pb.FINISH_REASON_ABORTED
            tokens = [id_ for part in parts for id_ in part.token_ids]
            assert parts[-1].usage.completion_tokens == len(tokens)
            assert parts[-1].HasField("timing")
            assert not (await served.control.Abort(control_pb2.AbortRequest(request_ids=["long"]))).aborted_ids
            with pytest.raises(grpc.aio.AioRpcError, match="request_ids: is empty"):
                await served.control.Abort(control_pb2.AbortRequest())

        run(test)

    def test_trailing_metadata(self) -> None:
        async def test(served: Served) -> None:
            stream = served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=request(request_id="mine")))
            timing = [part async for part in stream][-1].timing
            trailers = dict(await stream.trailing_metadata())
            assert trailers["x-request-id"] == "mine"
            times = [float(trailers[f"x-{part}-seconds"]) for part in ("queue", "prefill", "decode")]
            assert min(times) >= 0
            assert sum(times) == pytest.approx(timing.total_seconds, abs=1e-5)
            assert times[0] + times[1] == pytest.approx(timing.first_token_seconds, abs=1e-5)
            for call in (served.stub.Generate(request()), served.stub.Score(pb.ScoreRequest(text="hello"))):
                await call
                assert {"x-request-id", "x-queue-seconds"} <= set(dict(await call.trailing_metadata()))

        run(test)


def test_bad_requests_disturb_nobody() -> None:
    bad = [
        request(sampling={"top_p": 2.0}),
        request(structured={"regex": "("}),
        request(stopping={"stop_strings": [""]}),
        request(response={"logprobs": 1000}),
    ]

    async def test(served: Served) -> None:
        good = [served.stub.Generate(request()) for _ in range(4)]
        for asked in bad:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.stub.Generate(asked)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for call in good:
            assert list((await call).candidates[0].token_ids) == golden_tokens(PROMPT)

    run(test)

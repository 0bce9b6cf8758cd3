"""Prompts of rows in place of token ids: what is refused, and that the rows of a golden prompt give its tokens in every
way that a prompt can be computed: whole, in chunks, again, by another worker, beside others, for several candidates.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from grokmoe import Embeds, tensor_names
from grokmoe import errors as sdk
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import InvalidRequest, Reason
from grokmoe.v1 import generation_pb2 as pb
from grokmoe.v1 import tensor_pb2
from router.request import PromptEmbeds, Request
from router.validation import PromptReader, RequestReader, embeds
from router.validation.embeds import read_embeds
from tests import goldens
from tests.router.faulty_attention import Fault, FaultyAttention
from tests.router.pipelines import SPLITS, faulty_stages, pipeline
from tests.router.served import TOKENIZER, Served, service
from tests.router.tiny import CONFIG, attention_link, candidates_of, golden_request, golden_tokens, serving, tokens_of

PROMPTS = [*goldens.PROMPTS]


def rows_of(prompt: str) -> torch.Tensor:
    """What the model's embedding gives for a golden prompt, [tokens, hidden]."""
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        embedding_VD = checkpoint.read(tensor_names.embed(), torch.float32)
    return embedding_VD[goldens.PROMPTS[prompt]] * CONFIG.embedding_multiplier


def message(rows_TD: torch.Tensor, **changes: Any) -> tensor_pb2.Tensor:
    wire = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.int64: "INT64"}[rows_TD.dtype]
    fields: dict[str, Any] = {
        "dtype": tensor_pb2.DataType.Value(f"DATA_TYPE_{wire}"),
        "shape": rows_TD.shape,
        "data": rows_TD.contiguous().view(torch.uint8).numpy().tobytes(),
    }
    return tensor_pb2.Tensor(**{**fields, **changes})


def read(tensor: tensor_pb2.Tensor, **fields: Any) -> Request:
    reader = RequestReader(CONFIG, PromptReader(CONFIG, TOKENIZER), None)
    return asyncio.run(reader.generate(pb.GenerateRequest(inputs_embeds=tensor, **fields))).request


def embeds_of(rows_TD: torch.Tensor) -> PromptEmbeds:
    return asyncio.run(read_embeds(message(rows_TD), CONFIG))


def embedded(prompt: str, **changes: Any) -> Request:
    """A golden prompt by its rows, greedy."""
    return _embedded(prompt, embeds_of(rows_of(prompt)), **changes)


def _embedded(prompt: str, rows: PromptEmbeds, **changes: Any) -> Request:
    ids = (0,) * len(rows.rows_TD)
    return golden_request(prompt, prompt_ids=ids, embeds=rows, **changes)


ROWS = torch.ones(3, CONFIG.hidden_size)


class TestReading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_are_taken_as_they_are(self, dtype: torch.dtype) -> None:
        rows_TD = torch.randn(5, CONFIG.hidden_size).to(dtype)
        request = read(message(rows_TD))
        assert request.prompt_ids == (0,) * 5
        assert request.embeds is not None
        assert torch.equal(request.embeds.rows_TD, rows_TD)
        chunk = request.embeds.chunk(1, 4)
        assert chunk.dtype is torch.float32
        assert torch.equal(chunk, rows_TD[1:4].float())
        assert torch.equal(request.embeds.chunk(3, 9), rows_TD[3:].float()), "what follows has ids"
        assert request.embeds.chunk(5, 6) is None

    @pytest.mark.parametrize(
        ("tensor", "field", "words"),
        [
            (tensor_pb2.Tensor(), "inputs_embeds.dtype", ("must be one of",)),
            (message(ROWS, dtype=99), "inputs_embeds.dtype", ("99",)),
            (message(ROWS[0]), "inputs_embeds.shape", (str(CONFIG.hidden_size), "[tokens, ")),
            (message(ROWS[None]), "inputs_embeds.shape", ("[1, 3, ", "[tokens, ")),
            (message(ROWS[:, :-1]), "inputs_embeds.shape", (f"[3, {CONFIG.hidden_size - 1}]",)),
            (message(ROWS[:0]), "inputs_embeds.shape", ("no tokens",)),
            (message(ROWS, shape=[2**32 - 1] * 4), "inputs_embeds.data", ("needs",)),
            (message(ROWS, shape=[0, *[2**32 - 1] * 4], data=b""), "inputs_embeds", ()),
            (message(ROWS, shape=[1] * 100), "inputs_embeds.shape", ("dimensions",)),
            (message(ROWS, data=b"1234"), "inputs_embeds.data", ("4 bytes", "needs")),
            (message(ROWS, shape=[4, CONFIG.hidden_size]), "inputs_embeds.data", ("needs",)),
            (message(ROWS * torch.tensor([[1.0], [float("nan")], [1.0]])), "inputs_embeds.data", ("token 1",)),
            (message(ROWS * torch.tensor([[1.0], [1.0], [float("inf")]])), "inputs_embeds.data", ("token 2",)),
            (message((ROWS * -float("inf")).bfloat16()), "inputs_embeds.data", ("not finite", "token 0")),
            (
                message(torch.ones(CONFIG.context_length, CONFIG.hidden_size)),
                "inputs_embeds.shape",
                (f"{CONFIG.context_length} tokens", f"allows {CONFIG.context_length - 1}"),
            ),
        ],
    )
    def test_what_is_refused_names_its_field(
        self, tensor: tensor_pb2.Tensor, field: str, words: tuple[str, ...]
    ) -> None:
        with pytest.raises(InvalidRequest) as caught:
            read(tensor)
        assert caught.value.field == field
        for word in words:
            assert word in caught.value.message

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"sampling": pb.SamplingParams(repetition_penalty=1.5)}, "sampling.repetition_penalty"),
            ({"response": pb.ResponseOptions(echo=True)}, "response.echo"),
            ({"response": pb.ResponseOptions(prompt_logprobs=0)}, "response.prompt_logprobs"),
            ({"tokenize": pb.TokenizeOptions(add_bos=True)}, "tokenize"),
        ],
    )
    def test_what_needs_ids_is_refused_beside_them(self, fields: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidRequest, match="inputs_embeds") as caught:
            read(message(ROWS), **fields)
        assert (caught.value.field, caught.value.reason) == (field, Reason.CONFLICTING_FIELDS)

    def test_what_says_nothing_of_the_prompt_is_not(self) -> None:
        request = read(
            message(ROWS),
            sampling=pb.SamplingParams(repetition_penalty=1, presence_penalty=1, frequency_penalty=1, n=2),
            response=pb.ResponseOptions(echo=False, logprobs=2),
        )
        assert (request.n, request.logprobs) == (2, 2)

    @pytest.mark.parametrize("value", [1.0, float("nan")])
    def test_many_bytes_are_read_on_another_thread(self, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
        monkeypatch.setattr(embeds, "INLINE_BYTES", 8)
        monkeypatch.setattr(embeds.asyncio, "to_thread", _noting(called := [], asyncio.to_thread))
        if value == value:
            assert read(message(ROWS * value)).embeds is not None
        else:
            with pytest.raises(InvalidRequest, match="not finite"):
                read(message(ROWS * value))
        assert len(called) == 1

    def test_the_digest_names_shape_type_and_numbers(self) -> None:
        zeros = torch.zeros(2, CONFIG.hidden_size)
        bits = zeros.bfloat16()
        rows = [zeros, bits, zeros[:1], torch.zeros(4, CONFIG.hidden_size).bfloat16(), zeros + 1]
        digests = [embeds_of(each).digest for each in rows]
        assert len(set(digests)) == len(rows)
        assert {len(each) for each in digests} == {16}
        assert embeds_of(zeros.clone()).digest == digests[0]


def _noting(called: list[Any], real: Any) -> Any:
    async def to_thread(function: Any, *arguments: Any) -> Any:
        called.append(function)
        return await real(function, *arguments)

    return to_thread


async def check(engine: Any, prompts: list[str] = PROMPTS) -> None:
    """Asks for all at the same time, by rows and by ids."""
    by_rows = [embeds_of_async(rows_of(prompt)) for prompt in prompts]
    rows = await asyncio.gather(*by_rows)
    asked = [engine.submit(_embedded(prompt, each)) for prompt, each in zip(prompts, rows, strict=True)]
    asked += [engine.submit(golden_request(prompt)) for prompt in prompts]
    for prompt, generation in zip(prompts * 2, asked, strict=True):
        assert await tokens_of(generation) == golden_tokens(prompt), prompt


async def embeds_of_async(rows_TD: torch.Tensor) -> PromptEmbeds:
    return await read_embeds(message(rows_TD), CONFIG)


class TestComputing:
    @pytest.mark.parametrize("max_step_tokens", [1, 5, 24, 512])
    def test_rows_give_the_tokens_of_their_ids(self, max_step_tokens: int) -> None:
        async def main() -> None:
            async with serving(attention_link(), max_step_tokens=max_step_tokens) as engine:
                await check(engine)

        asyncio.run(main())

    @pytest.mark.parametrize("cuts", SPLITS)
    def test_only_the_first_stage_of_a_pipeline_has_use_for_them(self, cuts: tuple[int, ...]) -> None:
        async def main() -> None:
            async with serving(pipeline(*faulty_stages(cuts)), max_step_tokens=24) as engine:
                await check(engine)

        asyncio.run(main())

    def test_logits_are_those_of_their_ids(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                rows = await embeds_of_async(rows_of("len33"))
                generations = [
                    engine.submit(golden_request("len33", logits=True)),
                    engine.submit(_embedded("len33", rows, logits=True)),
                ]
                logits = []
                for generation in generations:
                    assert await tokens_of(generation) == golden_tokens("len33")
                    logits.append(torch.cat([part for _, part in generation.logits()]))
                assert torch.equal(*logits)

        asyncio.run(main())

    def test_what_is_computed_again_begins_with_the_same_rows(self) -> None:
        """Too few pages for all: some are preempted in the middle of their output."""

        async def main() -> int:
            async with serving(attention_link(num_pages=16), max_step_tokens=24) as engine:
                rows = [await embeds_of_async(rows_of(prompt)) for prompt in PROMPTS]
                asked = [
                    (prompt, engine.submit(_embedded(prompt, each)))
                    for _ in range(3)
                    for prompt, each in zip(PROMPTS, rows, strict=True)
                ]
                for prompt, generation in asked:
                    assert await tokens_of(generation) == golden_tokens(prompt)
                return engine.report.num_preemptions

        assert asyncio.run(main()) > 0

    @pytest.mark.parametrize("fault", [Fault.DIE, Fault.DROP])
    @pytest.mark.parametrize("at", [0, 1, 4])
    def test_another_worker_gets_them_again(self, fault: Fault, at: int) -> None:
        async def main() -> None:
            links: list[Any] = [FaultyAttention({at: fault}), FaultyAttention({at: fault})]
            async with serving(links, max_step_tokens=24) as engine:
                await check(engine)
                assert engine.faults.losses > 0

        asyncio.run(main())

    def test_a_not_finite_step_is_computed_again_from_them(self) -> None:
        async def main() -> None:
            async with serving(FaultyAttention({0: Fault.NAN, 2: Fault.NAN}), max_step_tokens=24) as engine:
                await check(engine)

        asyncio.run(main())

    def test_candidates_share_them(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                rows = await embeds_of_async(rows_of("len33"))
                answers = await candidates_of(engine.submit(_embedded("len33", rows, n=3)))
                assert answers == [golden_tokens("len33")] * 3

        asyncio.run(main())

    def test_output_that_the_caller_has_follows_them(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                rows, tokens = await embeds_of_async(rows_of("len7")), golden_tokens("len7")
                resumed = _embedded("len7", rows, resumed_ids=tuple(tokens[:6]))
                assert await tokens_of(engine.submit(resumed)) == tokens[6:]

        asyncio.run(main())


class TestSharing:
    """len33 has four full pages of its own; with its output there are five."""

    async def shared(self, *requests: Request) -> list[int]:
        """Tokens that each found in the prefix cache, one after the other."""
        found = []
        async with serving(attention_link()) as engine:
            for request in requests:
                generation = engine.submit(request)
                await tokens_of(generation)
                found.append(generation.sequences[0].num_cached_tokens)
        return found

    def test_equal_rows_are_computed_once(self) -> None:
        one, same = embedded("len33"), embedded("len33")
        assert asyncio.run(self.shared(one, same)) == [0, 32]

    def test_rows_are_never_taken_for_ids(self) -> None:
        """The ids beside rows are zeros, and so are a caller's who sends that many."""
        zeros = golden_request("len33", prompt_ids=(0,) * 33)
        assert asyncio.run(self.shared(embedded("len33"), zeros, embedded("len33"), zeros_again())) == [0, 0, 32, 32]

    def test_other_rows_of_the_same_length_are_others(self) -> None:
        other = _embedded("len33", embeds_of(rows_of("len33") * 1.5))
        assert asyncio.run(self.shared(embedded("len33"), other)) == [0, 0]


def zeros_again() -> Request:
    return golden_request("len33", prompt_ids=(0,) * 33)


class TestService:
    def test_by_the_client(self) -> None:
        async def test(served: Served) -> None:
            for dtype in (torch.float32, torch.bfloat16):
                rows_TD = rows_of("len33").to(dtype)
                array = rows_TD.numpy() if dtype is torch.float32 else rows_TD.view(torch.int16).numpy()
                prompt = Embeds.of(array, str(dtype).removeprefix("torch."))
                answer = await served.client.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True)
                assert answer.usage.prompt_tokens == 33
                if dtype is torch.float32:
                    assert list(answer.token_ids) == golden_tokens("len33")
                parts = [
                    part async for part in served.client.stream(prompt, max_tokens=16, temperature=0, ignore_eos=True)
                ]
                assert [id_ for part in parts for id_ in part.token_ids] == list(answer.token_ids)

        run(test)

    def test_a_refusal_says_what_of_it_is_wrong(self) -> None:
        async def test(served: Served) -> None:
            with pytest.raises(sdk.InvalidRequest) as caught:
                await served.client.generate(Embeds.of(np.ones((3, 5), np.float32)))
            assert caught.value.field == "inputs_embeds.shape"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await served.stub.Generate(pb.GenerateRequest(inputs_embeds=message(ROWS, data=b"")))
            status = rpc_status.from_call(refused.value)
            details = error_details_pb2.BadRequest()
            assert any(each.Unpack(details) for each in status.details)
            assert details.field_violations[0].field == "inputs_embeds.data"

        run(test)


def run(test: Any) -> None:
    async def main() -> None:
        async with service() as served:
            await test(served)

    asyncio.run(main())

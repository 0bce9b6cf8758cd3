"""The engine as on a GPU: its own wiring with the Triton kernels, interpreted, on the tensors of a CPU.

And on tensors that only say that they are on a GPU: which operation finds its tensors where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_worker import model
from attention_worker.config import AttentionWorkerSettings
from attention_worker.device_kernels import TritonKernels, select_kernels
from attention_worker.kernels.low_rank import Segments
from attention_worker.kv_cache import KVCache
from attention_worker.loading import load_engine
from attention_worker.lora.step import DrawnRows, ReadRows, StepAdapters
from attention_worker.model import Model
from attention_worker.sharding import Shard
from attention_worker.step_batch import StepBatch
from attention_worker.weights import AttentionWeights, LayerWeights
from grokmoe.errors import ConfigError
from grokmoe.model_config import TINY
from grokmoe.packed_linear import PackedLinear
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk
from grokmoe.telemetry import AttentionMetrics, new_registry
from tests import goldens, lora_adapters
from tests.attention_worker.tiny_engine import adapter_store, attention_engine, device, run_step

PROMPT = tuple(goldens.PROMPTS["len33"])


@pytest.fixture
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    from tests.triton_interpreter import interpreted

    monkeypatch.setattr(model, "select_kernels", lambda device, deterministic: select_kernels("cuda", deterministic))
    with interpreted():
        yield


@pytest.mark.usefixtures("_on_triton")
def test_golden_logits_and_tokens() -> None:
    """A prompt in two chunks beside another one, then decoding: logits and tokens of the reference."""
    engine = attention_engine()
    other = tuple(goldens.PROMPTS["len7"])
    found = []
    for begin, end in ((0, 20), (20, 33)):
        pages = (7, 2, 9, 4, 0)[: -(-end // 8)]
        chunk = SequenceChunk(PROMPT[begin:end], begin, pages, GREEDY if end == 33 else None, LogitsScope.ALL)
        result = run_step(engine, chunk, SequenceChunk(other, 0, (20,), GREEDY))
        found.append(result.logits)
    assert (torch.cat(found) - goldens.logits("seed", "len33")).abs().max() < 1e-4
    tokens = [result.token_ids[0]]
    assert result.token_ids[1] == goldens.greedy("seed", "len7")[0]
    for start in (33, 34):
        step = run_step(engine, SequenceChunk((tokens[-1],), start, (7, 2, 9, 4, 0), GREEDY))
        tokens += step.token_ids
    assert tokens == goldens.greedy("seed", "len33")[:3]


def test_an_adapter_with_added_tokens() -> None:
    """What PEFT's merged weights say, through the interpreted kernels, beside a sequence without one."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import interpreted

    store = adapter_store({"tokens": lora_adapters.FOLDER / "tokens"})
    (info,) = store.loaded
    parts = [part for layer in store.find(info.id).parts for part in layer if part is not None]
    prompt = tuple(lora_adapters.prompt("tokens"))
    chunk = SequenceChunk(prompt, 0, (7, 2, 9, 4, 0), GREEDY, LogitsScope.ALL, adapter=info.id)
    with pytest.MonkeyPatch.context() as patch, interpreted([x for part in parts for x in (part.a_RI, part.b_RO)]):
        patch.setattr(model, "select_kernels", lambda device, deterministic: select_kernels("cuda", deterministic))
        other = SequenceChunk(tuple(goldens.PROMPTS["len7"]), 0, (20,), GREEDY)
        result = run_step(attention_engine(adapters=store), other, chunk)
    assert (result.logits - lora_adapters.logits("tokens")).abs().max() < 1e-4
    assert result.token_ids == (goldens.greedy("seed", "len7")[0], lora_adapters.greedy("tokens")[0])


def test_a_gpu_gets_triton() -> None:
    pytest.importorskip("triton")
    assert isinstance(select_kernels("cuda:1", deterministic=True), TritonKernels)


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "gpu"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    if torch.cuda.is_available() and name != "gpu":
        pytest.skip("this machine has one")
    settings = AttentionWorkerSettings(model=str(goldens.DIRECTORY), device=name)
    with pytest.raises(ConfigError, match=f"device is '{name}'"):
        load_engine(settings, AttentionMetrics(new_registry()), device())


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_mixes_host_and_device(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """A step on tensors that say they are on a GPU and hold nothing: torch refuses operations on tensors of two
    devices, and what a kernel is launched with is looked at. Hole and logits are where the contract says."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from attention_worker import step_batch
    from attention_worker.kernels import triton_attention, triton_lora

    launched: list[str] = []

    def launch(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        places = {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
        assert places == {"cuda"}, (self.fn.__name__, places)
        launched.append(self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(triton_attention, "num_processors", lambda device: 132)
    for module in (step_batch, triton_attention, triton_lora):  # memory cannot be pinned without a GPU
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor.to(device))

    gpu = torch.device("cuda", 0)
    batch = StepBatch.build([SequenceChunk((1,) * 4, 0, (2,)), SequenceChunk((1,), 250, tuple(range(8, 40)))], 8)
    own = some_segments()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        weights = fake_weights(gpu, deterministic)
        adapters = fake_adapters(own, gpu)
        cache = KVCache(TINY.num_layers, 64, 8, TINY.num_kv_heads, TINY.head_dim, torch.bfloat16, gpu)
        forward = Model(TINY, weights, cache).forward(batch, torch.zeros(2, dtype=torch.int64), None, adapters)
        x_TD = next(forward)
        for _ in range(TINY.num_layers - 1):
            assert (x_TD.device.type, x_TD.shape) == ("cpu", (5, TINY.hidden_size))
            x_TD = forward.send(torch.empty_like(x_TD))
        with pytest.raises(StopIteration) as end:
            forward.send(torch.empty_like(x_TD))
    assert (end.value.value.device, end.value.value.shape) == (gpu, (2, TINY.vocab_size + 3))
    assert set(launched) >= {"norm_kernel", "rotate_and_store_kernel", "paged_attention_kernel", "into_ranks_kernel"}


def some_segments() -> Segments:
    """The first four rows of five have an adapter."""
    entries = [(0, 0, 16, 0, num_out, 0) for num_out in (TINY.query_size, TINY.kv_size, TINY.kv_size, TINY.hidden_size)]
    return Segments(np.arange(4), (4,), (), np.array([[entries]] * TINY.num_layers))


def fake_adapters(segments: Segments, place: torch.device) -> StepAdapters:
    """With three added tokens, one of them read."""
    rows_XD = torch.empty(3, TINY.hidden_size, dtype=torch.bfloat16, device=place)
    rows_N = torch.zeros(1, dtype=torch.int64)
    read, drawn = ReadRows(rows_XD, rows_N, rows_N), DrawnRows(PackedLinear(rows_XD), rows_N)
    return StepAdapters(segments, (read,), (drawn,), (TINY.vocab_size + 3, TINY.vocab_size))


def fake_weights(place: torch.device, deterministic: bool) -> AttentionWeights:
    """Of TINY, with what says which row counts agree left out: it looks at values."""

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=place)

    D = TINY.hidden_size
    gains = [make(D, dtype=torch.float32) for _ in range(4)]
    qkv = PackedLinear(make(TINY.query_size + 2 * TINY.kv_size, D))
    layer = LayerWeights(*gains, qkv, PackedLinear(make(D, TINY.query_size)))
    embedding_VD = make(TINY.vocab_size, D)
    layers = (layer,) * TINY.num_layers
    return AttentionWeights(
        embedding_VD, layers, gains[0], PackedLinear(embedding_VD), torch.bfloat16, Shard.whole(TINY), 0, deterministic
    )

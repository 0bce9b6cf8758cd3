"""The yardstick computes the model: the tokens of the reference, prompt and decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.peers import straight_torch, yardstick
from benchmarks.peers.straight_torch import StraightTorch
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.model_config import TINY, Gelu
from grokmoe.reference import reference_logits

IDS = list(range(3, 43))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    random_checkpoint(path, TINY, seed=3)
    return path


def test_a_prompt_has_the_token_of_the_reference(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_torch, "QUERY_BLOCK", 16)  # so that a prompt has whole blocks and a rest
    with Checkpoint.open(directory) as checkpoint:
        logits = reference_logits(checkpoint, IDS)
    model = StraightTorch(directory)
    chosen = [int(model.prefill(torch.tensor(IDS[:length]))) for length in range(1, len(IDS) + 1)]
    # In bfloat16 a token may be another one, but hardly worse: by the reference it is close to the best.
    behind = [float(logits[at].max() - logits[at, token]) for at, token in enumerate(chosen)]
    assert max(behind) < 0.1 * float(logits.std())
    assert sum(gap == 0 for gap in behind) >= 0.8 * len(behind)


def test_decode_goes_on_where_a_prompt_ends(directory: Path) -> None:
    """Two sequences, token by token through the caches, against each whole prompt at once."""
    model = StraightTorch(directory)
    sequences = torch.tensor([IDS[:20], IDS[20:40]])
    caches = model.caches(2, 20)
    for position in range(20):
        drawn = model.decode(sequences[:, position], position, caches)
    assert drawn.tolist() == [int(model.prefill(sequence)) for sequence in sequences]


def test_the_parts_are_less_than_the_whole(directory: Path) -> None:
    job = {"prefills": (8, 16), "batches": (1, 2), "prompt": 4, "new": 3, "repeats": 2}
    found = yardstick.measure(StraightTorch(directory), job)
    assert found.keys() == {
        f"{row}: {metric}"
        for row in ("straight torch", "its parts")
        for metric in ("prefill 8", "prefill 16", "decode 1", "decode 2")
    }
    assert all(found[f"its parts: {name}"] > found[f"straight torch: {name}"] > 0 for name in ("prefill 8", "decode 2"))


def test_both_forms_of_gelu() -> None:
    x, weight = torch.randn(4, 64), torch.eye(64)
    for gelu, form in ((Gelu.ERF, "none"), (Gelu.TANH, "tanh")):
        expected = torch.nn.functional.gelu(x.bfloat16(), approximate=form)
        torch.testing.assert_close(straight_torch.product(weight, gelu)(x.bfloat16()), expected, atol=0.02, rtol=0.02)

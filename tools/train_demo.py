"""Train the demo model: `python tools/train_demo.py --out launcher/demo_model`.

Fetches Shakespeare's works, trains a byte-level BPE and a small Grok-1 on them, and writes the model folder
with a card of what was measured from the saved weights. Made for two CPU cores.
"""

import argparse
import ctypes
import itertools
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo_card import measure, write_card
from demo_corpus import Corpus, fetch_package, load_corpus
from demo_network import Network, NetworkConfig, balance_loss, golden_error, load_network, save_network
from demo_tokenizer import encode_documents, save_tokenizer, train_tokenizer
from torch import Tensor
from torch.nn import functional

GOLDEN_TOLERANCE = 1e-4

CONFIG: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier_scale": 16.0,
    "output_multiplier_scale": 0.5773502691896257,
    "attn_output_multiplier": 1.0,
    "max_attn_value": 30.0,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
    "use_cache": True,
}


@dataclass(frozen=True)
class Plan:
    """How to train. The card prints these."""

    steps: int
    minutes: float  # wall time; a run that meets this limit first depends on the machine's speed
    seed: int = 1
    tokens_per_step: int = 2048
    # Most windows are short because attention costs their square; the long ones teach every position.
    window_lengths: tuple[int, ...] = (256, 256, 256, 256, 256, 1024)
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_norm: float = 1.0
    balance_coefficient: float = CONFIG["router_aux_loss_coef"]
    validate_every: int = 300
    report_every: int = 20

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is done, 0 to 1, by steps or by seconds elapsed, whichever is further."""
        return min(1.0, max(step / self.steps, elapsed / (60 * self.minutes)))

    def learning_rate_at(self, step: int, progress: float) -> float:
        """Linear warmup, then a cosine from the peak to the final rate; step counts from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning each to the kernel.

    A step frees and allocates the same gigabyte; faulting its pages in anew makes it 1.5 to 3 times as long.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def batches(tokens_n: Tensor, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each int64 [B, T].

    Each pass cuts the text anew, at a random phase, and shuffles the windows.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    windows = {length: iter(()) for length in plan.window_lengths}
    for length in itertools.cycle(plan.window_lengths):
        size = plan.tokens_per_step // length
        starts = list(itertools.islice(windows[length], size))
        if len(starts) < size:
            phase = int(torch.randint(length, (), generator=generator))
            fresh = torch.arange(phase, len(tokens_n) - length, length)
            windows[length] = iter(fresh[torch.randperm(len(fresh), generator=generator)].tolist())
            starts = list(itertools.islice(windows[length], size))
        rows = torch.stack([tokens_n[start : start + length + 1] for start in starts])
        yield rows[:, :-1], rows[:, 1:]


def optimizer_for(network: Network, plan: Plan) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the gains alone."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=True)


def train(network: Network, train_n: Tensor, validation_n: Tensor, plan: Plan) -> dict[str, Any]:
    """Train in place and leave the network at its best validation loss; returns figures for the card."""
    optimizer = optimizer_for(network, plan)
    window = min(plan.window_lengths)
    best_loss, best_step, best_state = math.inf, 0, {}
    started = time.monotonic()
    for step, (inputs_BT, targets_BT) in enumerate(batches(train_n, plan)):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step, plan.progress(step, time.monotonic() - started))
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV, routings = network(inputs_BT)
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        balance = balance_loss(routings)
        (loss + plan.balance_coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), plan.gradient_norm)
        optimizer.step()
        optimizer.zero_grad()

        done, elapsed = step + 1, time.monotonic() - started
        progress = plan.progress(done, elapsed)
        if done % plan.report_every == 0:
            rate, minutes_left = done * plan.tokens_per_step / elapsed, elapsed / 60 * (1 / progress - 1)
            losses = f"loss {loss.item():.3f}  balance loss {balance.item():.3f}"
            print(
                f"step {done}/{plan.steps}  {losses}  {rate:.0f} tok/s  ETA {minutes_left:.1f} min",
                flush=True,
            )
        if done % plan.validate_every == 0 or progress == 1:
            validation_loss = measure(network, validation_n, window).loss
            print(f"step {done}  validation loss {validation_loss:.4f}", flush=True)
            if validation_loss < best_loss:
                best_loss, best_step = validation_loss, done
                best_state = {name: value.clone() for name, value in network.state_dict().items()}
        if progress == 1:
            break
    network.load_state_dict(best_state)
    return {"steps_done": done, "best_step": best_step, "minutes_taken": (time.monotonic() - started) / 60}


def build(corpus: Corpus, plan: Plan, out: Path) -> None:
    """Train tokenizer and model on the corpus, write the model folder, measure it and write its card."""
    tokenizer = train_tokenizer(corpus.train, CONFIG["vocab_size"])
    save_tokenizer(tokenizer, out)
    splits = {name: encode_documents(tokenizer, texts) for name, texts in asdict(corpus).items()}
    print("tokens:", {name: len(tokens) for name, tokens in splits.items()}, flush=True)
    network = Network(NetworkConfig.from_dict(CONFIG))
    figures = asdict(plan) | train(network, splits["train"], splits["validation"], plan)
    save_network(network, out, CONFIG)
    print("best step:", figures["best_step"], flush=True)
    write_card(out, load_network(out), tokenizer, corpus, splits, figures)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="model folder to write")
    parser.add_argument("--corpus", type=Path, help="package archive or folder of its texts, instead of a download")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--minutes", type=float, default=36.0, help="end training, schedule included, by then")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-goldens", type=Path, metavar="DIR", help="only compare with reference logits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.check_goldens:
        error = golden_error(arguments.check_goldens)
        print(f"largest difference from the reference logits: {error:.2e}")
        sys.exit(error >= GOLDEN_TOLERANCE)
    if not arguments.out:
        parser.error("--out is required")
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    source = arguments.corpus or fetch_package(Path(tempfile.gettempdir()) / "grokmoe-demo-corpus")
    build(load_corpus(source), Plan(arguments.steps, arguments.minutes, arguments.seed), arguments.out)


if __name__ == "__main__":
    main()

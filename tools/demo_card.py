"""Measures the demo model and writes its card: held-out perplexity, expert shares, samples.

Shapes: T positions, V vocabulary, L layers, E experts.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import PACKAGE, PACKAGE_SHA256, PACKAGE_VERSION, TEST_WORK, VALIDATION_WORK, Corpus
from demo_network import Network
from tokenizers import Tokenizer
from torch import Tensor

EOS = 2
PROMPTS = ("ROMEO.\n", "SCENE II. A room in the castle.\n\n", "KING HENRY.\nMy lords, ", "Shall I compare thee to ")
SAMPLE_TOKENS = 140
TEMPERATURE, TOP_P = 0.8, 0.95
MEASURE_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Measurement:
    """Next-token loss over a text and where its tokens were routed."""

    nats: float  # summed over predicted tokens
    num_predicted: int
    shares_LE: Tensor  # float64, share of a layer's choices per expert; rows sum to 1

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_predicted

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


@torch.no_grad()
def measure(network: Network, tokens_n: Tensor, window: int) -> Measurement:
    """Predict each token but the first once, in windows that share no context; float32 arithmetic."""
    inputs, targets = tokens_n[:-1].split(window), tokens_n[1:].split(window)
    # All windows but a shorter last one go in batches.
    size = max(1, MEASURE_BATCH_TOKENS // window)
    full = len(tokens_n[:-1]) // window
    batches = [(inputs[i : min(i + size, full)], targets[i : min(i + size, full)]) for i in range(0, full, size)]
    if full < len(inputs):
        batches.append((inputs[full:], targets[full:]))
    nats, counts_LE = 0.0, torch.zeros(1)
    for batch_inputs, batch_targets in batches:
        logits_BTV, routings = network(torch.stack(batch_inputs))
        nats += F.cross_entropy(logits_BTV.flatten(0, 1), torch.cat(batch_targets), reduction="sum").item()
        counts_LE = counts_LE + torch.stack([routing.counts_E for routing in routings]).double()
    return Measurement(nats, len(tokens_n) - 1, counts_LE / counts_LE.sum(-1, keepdim=True))


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id: the largest logit at temperature 0, else a draw from the nucleus of mass top_p."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    probs_V[probs_V.cumsum(-1) - probs_V >= top_p] = 0
    return int(ids_V[torch.multinomial(probs_V, 1, generator=generator)])


@torch.no_grad()
def continue_text(
    network: Network, tokenizer: Tokenizer, prompt: str, temperature: float, top_p: float = 1.0, seed: int = 1
) -> str:
    """The prompt and up to SAMPLE_TOKENS more tokens, until <eos>."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer.encode(prompt).ids
    for _ in range(SAMPLE_TOKENS):
        logits_BTV, _ = network(torch.tensor([tokens]))
        token = choose(logits_BTV[0, -1], temperature, top_p, generator)
        if token == EOS:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def _loss_row(name: str, result: Measurement, documents: list[str]) -> str:
    text = "".join(documents)
    bits = result.nats / math.log(2)
    return (
        f"| {name} | {result.num_predicted + 1} | {result.perplexity:.2f} | {result.loss:.4f} "
        f"| {bits / len(text.encode()):.3f} | {math.exp(result.nats / len(text.split())):.0f} |"
    )


def _share_table(shares_LE: Tensor) -> list[str]:
    num_experts = shares_LE.shape[1]
    rows = ["| layer | " + " | ".join(f"expert {e}" for e in range(num_experts)) + " |", "| --- " * (num_experts + 1) + "|"]
    for layer, shares_E in enumerate(shares_LE.tolist()):
        rows.append(f"| {layer} | " + " | ".join(f"{share:.1%}" for share in shares_E) + " |")
    return rows


def _samples(network: Network, tokenizer: Tokenizer) -> list[str]:
    lines = []
    for title, temperature, top_p in ((f"temperature {TEMPERATURE}, top-p {TOP_P}", TEMPERATURE, TOP_P), ("greedy", 0.0, 1.0)):
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        for prompt in PROMPTS:
            lines += ["```text", continue_text(network, tokenizer, prompt, temperature, top_p).rstrip(), "```", ""]
    return lines


def write_card(
    out: Path, network: Network, tokenizer: Tokenizer, corpus: Corpus, splits: dict[str, Tensor], run: dict[str, Any]
) -> None:
    """Measure `network`, as loaded from the saved files, and write `out`/README.md; prints the card too."""
    config, short = network.config, min(run["window_lengths"])
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    rows = []
    for window in sorted(set(run["window_lengths"])):
        for split, work in (("validation", VALIDATION_WORK), ("test", TEST_WORK)):
            result = measure(network, splits[split], window)
            rows.append(_loss_row(f"{split} (`{work}`), context {window}", result, getattr(corpus, split)))
    shares_LE = measure(network, torch.cat((splits["validation"], splits["test"])), short).shares_LE
    epochs = run["steps"] * run["tokens_per_step"] / len(splits["train"])
    card = [
        "---",
        "language: en",
        "tags: [grok-1, mixture-of-experts, demo]",
        "---",
        "",
        "# Demo model",
        "",
        "A small language model of the Grok-1 architecture that writes lines after Shakespeare. It was trained from",
        "nothing by `tools/train_demo.py`. It is there to show and test the service: its routing is learned, its text",
        "is recognisable, and it knows nothing. This card is written by the same program from the saved weights.",
        "",
        "## Shape",
        "",
        f"{num_parameters:,} parameters, bfloat16: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} query heads and {config.num_key_value_heads} key/value heads of "
        f"{config.head_size}, {config.num_experts} experts of width {config.intermediate_size} with "
        f"{config.num_experts_per_tok} per token, tied head. The vocabulary is {config.vocab_size} byte-level BPE "
        "tokens, all 256 bytes among them; ids 0 to 3 are `<pad>`, `<bos>`, `<eos>` and `<unk>`. A prompt needs no "
        "`<bos>`; the model was never shown one.",
        "",
        "The function is the service's default one: erf GELU, router logits capped at 30, the chosen weights",
        "renormalised, attention logits scaled by d^-1/2 and capped at 30.",
        "",
        "## Data",
        "",
        f"Shakespeare's plays and poems in modern spelling, from the source distribution of the Python package "
        f"`{PACKAGE}` {PACKAGE_VERSION} (sha256 `{PACKAGE_SHA256}`), which took them from Project Gutenberg. The works "
        "are in the public domain. Lines are stripped, runs of blank lines closed up, bylines removed and speakers' "
        "names printed as `NAME.`; each scene, sonnet or cast list is a document and ends with `<eos>`. "
        f"Training text: {sum(map(len, corpus.train)):,} characters, {len(splits['train']):,} tokens. Two whole plays "
        f"are held out: `{VALIDATION_WORK}` chose the checkpoint, `{TEST_WORK}` was only measured at the end.",
        "",
        "## Training",
        "",
        f"{run['steps']} steps of {run['tokens_per_step']} tokens ({epochs:.1f} passes), {run['minutes']:.0f} minutes on "
        f"{torch.get_num_threads()} threads in bfloat16 autocast with float32 weights, seed {run['seed']}. AdamW, "
        f"learning rate {run['learning_rate']:g} to {run['final_learning_rate']:g} on a cosine after "
        f"{run['warmup_steps']} warmup steps, betas {run['betas'][0]}/{run['betas'][1]}, weight decay "
        f"{run['weight_decay']}, gradient norm {run['gradient_norm']}, load-balancing loss with coefficient "
        f"{run['balance_coefficient']}. Windows of {', '.join(map(str, run['window_lengths']))} tokens in turn, so "
        f"positions up to {max(run['window_lengths'])} were trained. The weights are those of step {run['best_step']}.",
        "",
        "## Held-out loss",
        "",
        "Every token is predicted once, from the tokens before it in its window.",
        "",
        "| text | tokens | perplexity per token | nats per token | bits per byte | perplexity per word |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "## Share of tokens per expert",
        "",
        f"Of all choices on the two held-out plays (an even share is {1 / config.num_experts:.1%}):",
        "",
        *_share_table(shares_LE),
        "",
        "## Samples",
        "",
        f"Up to {SAMPLE_TOKENS} tokens, seed 1, not selected.",
        "",
        *_samples(network, tokenizer),
    ]
    text = "\n".join(card).rstrip() + "\n"
    (out / "README.md").write_text(text)
    print(text)

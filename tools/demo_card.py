"""Measures the demo model and writes its card: held-out perplexity, expert shares, samples.

Shapes: B windows, T positions, V vocabulary, L layers, E experts, n tokens of a text.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_corpus import PACKAGE, PACKAGE_SHA256, PACKAGE_VERSION, TEST_WORK, VALIDATION_WORK, Corpus
from demo_network import Network
from demo_tokenizer import EOS
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

PROMPTS = (
    "JULIET.\nO Romeo,",
    "SCENE II. A room in the castle.\n\n",
    "KING HENRY.\nMy lords,",
    "Shall I compare thee",
)
SAMPLE_TOKENS = 140
TEMPERATURE, TOP_P = 0.8, 0.95
MEASURE_BATCH_TOKENS = 4096

CARD = """\
---
language: en
tags: [grok-1, mixture-of-experts, demo]
---

# Demo model

A small language model of the Grok-1 architecture that writes lines after Shakespeare, trained from nothing
by `tools/train_demo.py`. It is there to show and test the service: its routing is learned, its text is
recognisable, and it knows nothing. The same program wrote this card, from the saved weights.

## Shape

{num_parameters:,} parameters, bfloat16: {config.num_hidden_layers} layers, hidden {config.hidden_size},
{config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads of {config.head_size},
{config.num_experts} experts of width {config.intermediate_size}, {config.num_experts_per_tok} per token,
tied head. The vocabulary is {config.vocab_size} byte-level BPE tokens, all 256 bytes among them; ids 0 to 3
are `<pad>`, `<bos>`, `<eos>` and `<unk>`. A prompt needs no `<bos>`: the model was never shown one.

The function is the service's default one: erf GELU, router logits capped at 30, the chosen experts' weights
renormalised, attention logits scaled by d^-1/2 and capped at {config.max_attn_value:g}.

## Data

Shakespeare's plays and poems in modern spelling, from the source distribution of the Python package
`{package}` {package_version} (sha256 `{package_sha256}`),
which took them from Project Gutenberg. The works are in the public domain; the package puts a CC BY 2.5
notice on its content other than code. Lines are stripped, runs of blank lines closed up, bylines removed and
speakers' names printed as `NAME.`; each scene, sonnet or cast list is a document and ends with `<eos>`.

Training text: {num_documents} documents, {num_characters:,} characters, {num_tokens:,} tokens. Two whole
plays are held out: `{validation_work}` chose the checkpoint, `{test_work}` was only measured at the end.

## Training

{run[steps_done]} steps of {run[tokens_per_step]} tokens ({epochs:.1f} passes over the text)
in {run[minutes_taken]:.0f} minutes on {num_threads} threads, bfloat16 over float32 weights, seed {run[seed]}.
AdamW, learning rate {run[learning_rate]:g} falling to {run[final_learning_rate]:g} on a cosine
after {run[warmup_steps]} steps of warmup, betas {run[betas]}, weight decay {run[weight_decay]},
gradient norm at most {run[gradient_norm]:g}, load-balancing loss with coefficient {run[balance_coefficient]}.
Windows of {windows} tokens in turn, so positions below {max_window} were trained.
The weights are those of step {run[best_step]}.

The plan was {run[steps]} steps or {run[minutes]:g} minutes, whichever ends first; the learning rate follows the
nearer of the two. A run that the clock ends cannot be repeated exactly.

## Held-out loss

Every token is predicted once, from the tokens before it in its window.

{losses}

## Share of tokens per expert

Of all choices on the two held-out plays; an even share is {even_share:.1%}.

{shares}

## Samples

Up to {sample_tokens} tokens after the prompt (its first line or words), seed 1.

### Temperature {temperature}, top-p {top_p}

{sampled}

### Greedy

{greedy}
"""


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


@torch.no_grad()
def measure(network: Network, tokens_n: Tensor, window: int) -> Measurement:
    """Predict each token but the first, once, in windows that share no context; float32 arithmetic."""
    inputs, targets = tokens_n[:-1].split(window), tokens_n[1:].split(window)
    size = max(1, MEASURE_BATCH_TOKENS // window)
    num_full = (len(tokens_n) - 1) // window
    bounds = [(start, min(start + size, num_full)) for start in range(0, num_full, size)]
    if num_full < len(inputs):
        bounds.append((num_full, len(inputs)))  # the last window is shorter: a batch of its own
    nats, counts_LE = 0.0, torch.zeros(1)
    for start, end in bounds:
        logits_BTV, routings = network(torch.stack(inputs[start:end]))
        targets_n = torch.cat(targets[start:end])
        nats += functional.cross_entropy(logits_BTV.flatten(0, 1), targets_n, reduction="sum").item()
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _loss_table(network: Network, corpus: Corpus, splits: dict[str, Tensor], windows: list[int]) -> str:
    """Each held-out play at each window length."""
    head = ["play", "context", "tokens"]
    head += ["perplexity per token", "nats per token", "bits per byte", "perplexity per word"]
    rows = []
    for split, work in (("validation", VALIDATION_WORK), ("test", TEST_WORK)):
        text = "".join(getattr(corpus, split))
        for window in windows:
            result = measure(network, splits[split], window)
            bits_per_byte = result.nats / math.log(2) / len(text.encode())
            per_word = math.exp(result.nats / len(text.split()))
            figures = [f"{math.exp(result.loss):.2f}", f"{result.loss:.4f}"]
            figures += [f"{bits_per_byte:.3f}", f"{per_word:.0f}"]
            rows.append([f"`{work}` ({split})", str(window), str(len(splits[split])), *figures])
    return _table(head, rows)


def _share_table(shares_LE: Tensor) -> str:
    """Layers down, experts across."""
    head = ["layer", *(f"expert {expert}" for expert in range(shares_LE.shape[1]))]
    rows = [[str(layer), *(f"{share:.1%}" for share in row)] for layer, row in enumerate(shares_LE.tolist())]
    return _table(head, rows)


def _samples(network: Network, tokenizer: Tokenizer, temperature: float, top_p: float) -> str:
    """A fenced block per prompt."""
    texts = [continue_text(network, tokenizer, prompt, temperature, top_p).rstrip() for prompt in PROMPTS]
    return "\n\n".join(f"```text\n{text}\n```" for text in texts)


def write_card(
    out: Path,
    network: Network,
    tokenizer: Tokenizer,
    corpus: Corpus,
    splits: dict[str, Tensor],
    run: dict[str, Any],
) -> None:
    """Measure `network`, as loaded from the saved files, and write `out`/README.md.

    `splits` holds each split's tokens int64 [n]; `run` the plan's fields and what training reported.
    """
    windows = sorted(set(run["window_lengths"]))
    held_out_n = torch.cat((splits["validation"], splits["test"]))
    card = CARD.format(
        config=network.config,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        package=PACKAGE,
        package_version=PACKAGE_VERSION,
        package_sha256=PACKAGE_SHA256,
        num_documents=len(corpus.train),
        num_characters=sum(map(len, corpus.train)),
        num_tokens=len(splits["train"]),
        validation_work=VALIDATION_WORK,
        test_work=TEST_WORK,
        run=run,
        epochs=run["steps_done"] * run["tokens_per_step"] / len(splits["train"]),
        num_threads=torch.get_num_threads(),
        windows=", ".join(map(str, run["window_lengths"])),
        max_window=windows[-1],
        losses=_loss_table(network, corpus, splits, windows),
        even_share=1 / network.config.num_experts,
        shares=_share_table(measure(network, held_out_n, windows[0]).shares_LE),
        sample_tokens=SAMPLE_TOKENS,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        sampled=_samples(network, tokenizer, TEMPERATURE, TOP_P),
        greedy=_samples(network, tokenizer, 0.0, 1.0),
    )
    (out / "README.md").write_text(card)

"""What every figure means, for `--explain` and for the reports."""

from __future__ import annotations

FORMULAS = (
    ("scheduled_i", "when request i should be sent; drawn from the seed before the run, blind to the server"),
    ("woken_i, sent_i", "when the harness turned to it; when the call began (later only under max_concurrency)"),
    ("t_ij, n_ij", "when message j with tokens came, and how many tokens it had; n_i = sum over j of n_ij"),
    ("end_i", "when the message with the finish reason came"),
    ("ttft", "t_i1 - scheduled_i: time to first token, with whatever made the request late (no coordinated omission)"),
    ("ttft_sent", "t_i1 - sent_i: the same from the actual send; what vLLM's benchmark calls ttft"),
    ("tpot", "(t_ilast - t_i1) / (n_i - n_i1): per token after the first message; vLLM's when that has one token"),
    ("itl", "t_ij - t_i(j-1): every gap of every request; a message with several tokens is one gap"),
    ("e2el", "end_i - scheduled_i: end to end; e2el_sent: end_i - sent_i"),
    ("ntpot", "e2el / n_i: normalised latency, the first token's share included"),
    ("server_queue", "arrival at the server to its first step, in the server's own words"),
    ("client_queue_time", "sent_i - woken_i: what max_concurrency made the request wait at the client"),
    ("cancel", "of streams that were left on purpose: left - sent_i"),
    ("schedule lag", "woken_i - scheduled_i; the run is invalid if its 99th percentile is over max_lag_ms"),
    ("window", "shares of the schedule; latencies are of requests scheduled in it, throughputs of what came in it"),
    ("duration", "length of the window; of a whole run from its start to the end of the last request"),
    ("request_throughput", "requests that completed in the window / duration"),
    ("output_throughput", "tokens that came in the window / duration; total_token_throughput: and their prompts'"),
    ("good", "completed, and every latency named in goodput is within its limit; without TPOT, TPOT counts as 0"),
    ("request_goodput", "good requests of the window / duration"),
    ("slo_attained", "good / scheduled in the window, those cancelled on purpose left out; it holds from slo_share on"),
    (
        "failed",
        "ended with an error; by gRPC code and by reason (docs/errors.md). Calls are not tried again by default",
    ),
    ("incomplete", "still running drain_seconds after the last was due; cancelled then"),
    ("percentiles", "linear between the two nearest values; mean, std: of the population"),
    ("interval", "95 %, percentile bootstrap over requests, 1000 resamples (fewer, at least 200, above 20000 values)"),
    ("sweep", "the highest rate at which slo_attained holds and completions keep up with 0.9 of what was scheduled;"),
    ("", "a step whose harness was late is marked; it fails or holds by its figures, which include the lag"),
    ("compare", "B - A with a two-sample bootstrap; a regression is worse with confidence, and by more than threshold"),
    ("stall", "of a fault: the longest gap between two messages of one stream that spans or follows it"),
    ("recovery", "of a fault: when tokens/s are back at 0.9 of their mean before it, for two spans in a row"),
)


def explain() -> str:
    """A line per figure."""
    width = max(len(name) for name, _ in FORMULAS)
    return "\n".join(f"{name:{width}}  {text}" for name, text in FORMULAS)

"""Several continuations of one prompt. The prompt is computed once, its KV pages are shared."""

import argparse

from grokmoe import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

with Client(address) as client:
    answer = client.generate("HAMLET.\nTo be,", n=4, max_tokens=40, stop="\n\n", logprobs=0, seed=1)


def mean_logprob(candidate):
    """How likely the model finds a candidate, per token."""
    return sum(token.logprob for token in candidate.logprobs) / len(candidate.logprobs)


for candidate in sorted(answer.candidates, key=mean_logprob, reverse=True):
    text = candidate.text.replace("\n", " / ")
    print(f"{mean_logprob(candidate):6.2f} {candidate.finish_reason}: {text}")

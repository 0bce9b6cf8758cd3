"""Which of two texts the model finds more likely; nothing is generated."""

import argparse

from grokmoe import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

TEXTS = ("What say you, my lord?", "lord my, you say What?")

with Client(address) as client:
    for text in TEXTS:
        # A first token has nothing before it to be judged by; the model's begin-of-sequence id can stand there.
        judged = client.score(text, add_bos=True)
        print(f"{judged.perplexity:10.1f} perplexity, total log-probability {judged.total_logprob:7.2f}: {text}")
        least = min(judged.logprobs[1:], key=lambda token: token.logprob)
        print(f"{'':10} least likely token: {client.detokenize([least.token_id])!r}, rank {least.rank}")

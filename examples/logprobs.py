"""How sure the model was of each token, and what else it would have said."""

import argparse
import math

from grokmoe import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

with Client(address) as client:
    answer = client.generate("To be, or not to", max_tokens=8, temperature=0, logprobs=3)
    for token in answer.logprobs:
        drawn = client.detokenize([token.token_id])
        others = ", ".join(f"{client.detokenize([id_])!r} {math.exp(value):.0%}" for id_, value in token.top.items())
        print(f"{drawn!r:12} probability {math.exp(token.logprob):4.0%}, rank {token.rank}; most likely: {others}")

    # The whole distribution of the next token. It is kept as the server sent it until it is read.
    (token,) = client.generate("To be, or not to", max_tokens=1, logprobs=-1).logprobs
    entropy = -sum(math.exp(value) * value for value in token.top.values())
    print(f"entropy over {len(token.top)} tokens: {entropy:.2f} nats")

"""A text as it is made, token by token."""

import argparse

from grokmoe import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

prompt = "JULIET.\nO Romeo, Romeo,"

with Client(address) as client:
    # Leaving the block early ends the generation at the server too.
    with client.stream(prompt, max_tokens=60, temperature=0.8, top_p=0.95, seed=1) as stream:
        print(prompt, end="")
        for delta in stream:
            print(delta.text, end="", flush=True)
    done = stream.completion()  # the same text as a whole, and what it cost
    print(f"\n\n{done.usage.prompt_tokens} + {done.usage.completion_tokens} tokens, ended by {done.finish_reason}")
    print(f"first token after {done.timing.first_token_seconds * 1000:.0f} ms")

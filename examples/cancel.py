"""Three ways to end a generation before its time: leave the stream, a deadline, abort by name."""

import argparse

from grokmoe import Client, DeadlineExceeded, FinishReason

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

ENDLESS = {"max_tokens": 900, "ignore_eos": True}

with Client(address) as client:
    num_tokens = 0
    for delta in client.stream("HAMLET.\n", **ENDLESS):
        num_tokens += len(delta.token_ids)
        if num_tokens >= 5:
            break  # the server stops, and frees what the request held
    print(f"left after {num_tokens} tokens")

    try:
        client.generate("HAMLET.\n", timeout=0.05, **ENDLESS)
    except DeadlineExceeded:
        print("the deadline passed")

    # By name, from anywhere: an operator, another process. What was made so far is an answer.
    stream = client.stream("HAMLET.\n", request_id="a long speech", **ENDLESS)
    next(stream)
    print(f"aborted: {client.abort(['a long speech', 'nobody'])}")
    done = stream.completion()
    assert done.finish_reason is FinishReason.ABORTED
    print(f"it had made {done.usage.completion_tokens} tokens")

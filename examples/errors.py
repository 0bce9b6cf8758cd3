"""What can go wrong, and what a caller does about it."""

import argparse
import time

from grokmoe import Client, GrokmoeError, InvalidRequest, Reason, Retryable

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address


def ask(client, prompt, **options):
    """An answer, or None where asking again would not help."""
    for _ in range(3):
        try:
            return client.generate(prompt, **options).text
        except InvalidRequest as error:  # our mistake: the field says where
            print(f"{error.field}: {error.description} ({error.reason})")
            return None
        except Retryable as error:  # full, or a worker is missing: the server says how long to wait
            print(f"not now ({error.reason}), again in {error.retry_after} s")
            time.sleep(min(error.retry_after, 1.0))
        except GrokmoeError as error:  # everything else there is
            print(f"{error.code.name}: {error.message}")
            return None
    return None


# The client does the waiting by itself, three times (`retries`); here it is switched off to be seen.
with Client(address, retries=0) as client:
    print(ask(client, "HAMLET.\n", max_tokens=5))
    print(ask(client, "HAMLET.\n", top_p=1.5))
    try:
        client.generate("word " * 5000)
    except InvalidRequest as error:
        if error.reason is not Reason.PROMPT_TOO_LONG:  # finer than the type of the error, and as stable
            raise
        print("the prompt is too long")

with Client("127.0.0.1:1", retries=0) as client:  # nobody is there
    print(ask(client, "HAMLET.\n"))

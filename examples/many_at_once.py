"""Many texts at the same time on one connection. The server makes their tokens together, so it takes hardly longer."""

import argparse
import asyncio
import time

from grokmoe import AsyncClient

SPEAKERS = ("HAMLET", "JULIET", "MACBETH", "PORTIA", "FALSTAFF", "OPHELIA", "IAGO", "CORDELIA")


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        begin = time.perf_counter()
        calls = (client.generate(f"{speaker}.\n", max_tokens=30, seed=1) for speaker in SPEAKERS)
        answers = await asyncio.gather(*calls)
        seconds = time.perf_counter() - begin
    for speaker, answer in zip(SPEAKERS, answers, strict=True):
        print(f"{speaker}: {' '.join(answer.text.split())}")
    num_tokens = sum(answer.usage.completion_tokens for answer in answers)
    print(f"{len(answers)} texts, {num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
asyncio.run(main(parser.parse_args().address))

"""The other end of a pair, as a process of its own: does what its arguments say, and what it is sent goes back.

python -m tests.shared.pair_peer OFFER [SHAPE ...]; OFFER in hexadecimal, SHAPE as rows x columns:

    4x3         receives float32 of that shape and sends its double
    stop        stops itself with SIGSTOP, in the middle of whatever the other end does then
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import torch

from grokmoe.pairs import Pair, Rank
from grokmoe.v1 import expert_pb2


async def main(offer: str, *script: str) -> None:
    pair = Pair(expert_pb2.PairOffer.FromString(bytes.fromhex(offer)), Rank.WORKER, torch.device("cpu"))
    await pair.open()
    for each in script:
        if each == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            shape = [int(size) for size in each.split("x")]
            await pair.send(2 * await pair.receive(shape, torch.float32))
    pair.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

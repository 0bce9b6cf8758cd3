"""Rows between two processes by torch.distributed, beside a gRPC stream that carries everything else.

A pair is a process group of two ranks that belongs to one stream: the router's end and the worker's. So a peer that
dies or hangs takes nobody else's group with it. What goes over it, and when, is said on the stream first; both ends do
the same transfers in the same order, one at a time, and whatever goes wrong ends the pair. It is never mended: the
router offers another one, and until then rows travel in the stream's messages.

    rendezvous   the store through which two ends find each other
    ranks        the group itself: calls that block, one class per backend
    pair         one end: a thread of its own that does them
"""

from grokmoe.pairs.pair import Pair, PairBroken, Rank
from grokmoe.pairs.ranks import BACKENDS, GLOO, NCCL, check_backend
from grokmoe.pairs.rendezvous import Rendezvous

__all__ = ["BACKENDS", "GLOO", "NCCL", "Pair", "PairBroken", "Rank", "Rendezvous", "check_backend"]

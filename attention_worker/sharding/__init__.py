"""A model in parts: what each rank of a tensor-parallel worker holds, and how the parts become a whole again.

shard: who holds which heads and which rows of the vocabulary; pure. whole: what the model asks for, and the answer of a
worker of one rank. ranks: the answer of several. messages: how tensors go from rank to rank.
"""

from attention_worker.sharding.shard import HeadGroup, Shard, most_kv_heads
from attention_worker.sharding.whole import WHOLE, Sharding, Whole

__all__ = ["WHOLE", "HeadGroup", "Shard", "Sharding", "Whole", "most_kv_heads"]

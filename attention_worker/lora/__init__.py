"""LoRA adapters of the four projections of attention: read, kept and applied by row.

sources   names -> folders       config    adapter_config.json
files     the bytes, once        adapter   the weights, packed
store     which are loaded       deltas    which row of a step has which
"""

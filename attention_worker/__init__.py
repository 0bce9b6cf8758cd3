"""The attention worker: embedding, norms, attention over a paged KV cache, output head and sampler."""

from grokmoe.process_tuning import tune_process

tune_process()  # before a module of this package loads torch

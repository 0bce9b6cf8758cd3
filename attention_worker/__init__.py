"""The attention worker: embedding, norms, attention over a paged KV cache, output head and sampler."""

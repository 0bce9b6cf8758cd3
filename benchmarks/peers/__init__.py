"""grokmoe beside other servers of the same model: on the same cores, in the same minutes. `python -m benchmarks.peers`.

workload: what is measured; results: medians, spreads, ratios; goals: what is to be reached; report: tables.
race: round by round, one contender alive at a time; contender: what one is; machine: where, and who else used it.
service: grokmoe itself. straight_torch: the forward with nothing around it; yardstick: it as a contender.
llama_cpp: llama.cpp; gguf_model: the checkpoint as it takes it. vllm_peer: vLLM; vllm_program: run by its interpreter.
streams: loads of streaming clients; http_stream: for servers that speak HTTP; child: other people's programs.
"""

"""Run by the interpreter that has vLLM, and has nothing of ours: see `vllm_peer.py`. Argument: the job as JSON."""

import json
import random
import statistics
import sys
import time


def register_config():
    """transformers knows no `grok-1`; vLLM does, and only needs the keys of config.json."""
    from transformers import AutoConfig, PretrainedConfig

    class Grok1Config(PretrainedConfig):
        model_type = "grok-1"

    AutoConfig.register("grok-1", Grok1Config)


def main():
    """Prints the metrics in one line that begins with RESULT."""
    job = json.loads(sys.argv[1])
    register_config()
    from vllm import LLM, SamplingParams

    model = LLM(
        job["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=job["eager"],
        enable_prefix_caching=False,
        max_model_len=-(-job["most_tokens"] // 256) * 256,
        max_num_seqs=max([1, *job["batches"]]),
        max_num_batched_tokens=4096,
    )
    vocab_size = model.llm_engine.model_config.get_vocab_size()
    draw, ids = random.Random(job["seed"]), range(min(300, vocab_size // 2), vocab_size)

    def seconds(batch, prompt, new):
        prompts = [{"prompt_token_ids": draw.choices(ids, k=prompt)} for _ in range(batch)]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        answers = model.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
        return taken

    found = {}
    for length in job["prefills"]:
        times = [seconds(1, length, 1) for _ in range(job["repeats"] + 1)]
        found[f"prefill {length}"] = length / statistics.median(times[1:])
    for batch in job["batches"]:
        rates = []
        for _ in range(job["repeats"] + 1):
            first, whole = seconds(batch, job["prompt"], 1), seconds(batch, job["prompt"], job["new"] + 1)
            if whole > first:
                rates.append(batch * job["new"] / (whole - first))
        if rates[1:]:
            found[f"decode {batch}"] = statistics.median(rates[1:])
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

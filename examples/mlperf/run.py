"""A server as MLPerf's LoadGen sees it: Server and Offline scenarios through the SDK, with its log and its verdict.

    python examples/mlperf/run.py --scenario Server --rate 20 --address 127.0.0.1:50051
    python examples/mlperf/run.py --scenario Offline --rate 100

LoadGen decides what is sent when, and measures; this program only asks the server and says when the first and the last
token of each answer came. Prompts are random ids: it is a load, not a submission.
"""

import argparse
import array
import asyncio
import random
import sys
import threading
from pathlib import Path

import mlperf_loadgen as loadgen

from grokmoe import AsyncClient, GrokmoeError

# LoadGen's early stopping wants to be 99 % sure that 99 % of the queries keep the limits: with none that does not, that
# takes log(0.01) / log(0.99) = 459 queries, with three 1001. With fewer it says INVALID however fast the server is.
QUERIES = 1000


class System:
    """The system under test. LoadGen calls from a thread of its own, the client lives in an event loop's."""

    def __init__(self, address, prompts, max_tokens):
        self.prompts, self.max_tokens = prompts, max_tokens
        self.failures = []
        self.tasks = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client = self.wait(self.connect(address))

    def wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def connect(self, address):
        return AsyncClient(address, retries=0)

    def issue(self, samples):
        self.loop.call_soon_threadsafe(self.begin, [(sample.id, sample.index) for sample in samples])

    def begin(self, samples):
        for sample_id, index in samples:
            task = self.loop.create_task(self.answer(sample_id, self.prompts[index]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def answer(self, sample_id, prompt):
        tokens = []
        try:
            async for delta in self.client.stream(prompt, max_tokens=self.max_tokens, temperature=0, ignore_eos=True):
                if delta.token_ids and not tokens:
                    report(loadgen.FirstTokenComplete, sample_id, delta.token_ids)
                tokens += delta.token_ids
        except GrokmoeError as error:
            self.failures.append(error)  # LoadGen knows no errors: it would wait for ever
        report(loadgen.QuerySamplesComplete, sample_id, tokens)

    def close(self):
        self.wait(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def report(call, sample_id, tokens):
    """LoadGen copies the answer while it is called."""
    data = array.array("I", tokens)
    address, _ = data.buffer_info()
    call([loadgen.QuerySampleResponse(sample_id, address, len(data) * data.itemsize, len(data))])


def test_settings(options):
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.scenario = getattr(loadgen.TestScenario, options.scenario)
    settings.server_target_qps = settings.offline_expected_qps = options.rate
    settings.use_token_latencies = True
    settings.ttft_latency = round(options.ttft_ms * 1e6)
    settings.tpot_latency = round(options.tpot_ms * 1e6)
    settings.min_duration_ms = round(options.seconds * 1e3)
    settings.min_query_count = options.queries
    return settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--scenario", choices=("Server", "Offline"), default="Server")
    parser.add_argument("--rate", type=float, default=4.0, help="Server: Poisson arrivals; Offline: the most expected")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the run, at least")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"of the run, at least (default: {QUERIES})")
    parser.add_argument("--num-prompts", type=int, default=QUERIES, help="that differ; LoadGen draws from them")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--ttft-ms", type=float, default=2000.0, help="Server: limit of the 99th percentile")
    parser.add_argument("--tpot-ms", type=float, default=200.0, help="the same")
    parser.add_argument("--output-dir", type=Path, default=Path("mlperf-result"))
    options = parser.parse_args()

    draw = random.Random(0)
    prompts = [[draw.randrange(4, 2000) for _ in range(options.input_len)] for _ in range(options.num_prompts)]
    system = System(options.address, prompts, options.output_len)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(options.output_dir)
    logs.log_output.copy_summary_to_stdout = False
    under_test = loadgen.ConstructSUT(system.issue, lambda: None)
    library = loadgen.ConstructQSL(len(prompts), len(prompts), lambda samples: None, lambda samples: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, library, test_settings(options), logs)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(under_test)
        system.close()
    summary = (options.output_dir / "mlperf_log_summary.txt").read_text()
    print(summary)
    for error in system.failures[:3]:
        print(f"failed: {error.message}", file=sys.stderr)
    return 1 if system.failures or "Result is : VALID" not in summary else 0


if __name__ == "__main__":
    sys.exit(main())

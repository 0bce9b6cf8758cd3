"""A user for Locust (pip install locust) that streams through the SDK: TTFT, TPOT and the whole, as three entries.

    LOCUST_SKIP_MONKEY_PATCH=1 locust -f examples/locust_user.py --headless -u 8 -t 30s --host 127.0.0.1:50051

Locust's users are a closed loop: who waits for an answer sends nothing. `grokmoe loadtest` is an open one. gRPC needs
real threads, hence the variable; each stream runs in a thread of gevent's while the other users go on.
"""

import random
import time

import gevent
from locust import User, task

from grokmoe import Client, GrokmoeError


class GrokmoeUser(User):
    def on_start(self):
        gevent.get_hub().threadpool.maxsize = 1000  # a thread for each user, at most
        self.client = Client(self.host or "127.0.0.1:50051", retries=0)
        self.vocab_size = self.client.model().vocab_size

    def on_stop(self):
        self.client.close()

    @task
    def stream(self):
        begin = time.perf_counter()
        stamps, error = gevent.get_hub().threadpool.apply(self.ask)
        if error is None:
            self.report("TTFT", stamps[0] - begin)
            self.report("TPOT", (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1))
        self.report("whole", time.perf_counter() - begin, len(stamps), error)

    def ask(self):
        prompt = [random.randrange(4, self.vocab_size) for _ in range(64)]
        stamps = []
        try:
            for _ in self.client.stream(prompt, max_tokens=32, ignore_eos=True):
                stamps.append(time.perf_counter())
        except GrokmoeError as error:
            return stamps, error
        return stamps, None

    def report(self, name, seconds, length=0, error=None):
        fields = {"request_type": "gRPC", "name": name, "response_length": length, "exception": error}
        self.environment.events.request.fire(response_time=seconds * 1e3, **fields)

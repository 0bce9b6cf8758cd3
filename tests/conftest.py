"""What holds for every test: one thread per operation, and examples that may take their time."""

import os
from collections.abc import Iterator

from grokmoe.process_tuning import tune_process

tune_process()  # before torch is loaded

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Beside other tests an example may take any time. CI looks at the same examples each time: what it says of a change
# must be about the change. Everyone else's runs look further.
settings.register_profile(
    "shared-cores",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine says nothing about a test
)
settings.load_profile("shared-cores")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that a second thread only adds waiting, most of all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

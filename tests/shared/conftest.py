"""These models are so small that a second thread only adds waiting, most of all beside other tests."""

import pytest
import torch
from hypothesis import settings

# Beside other tests an example may take any time.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

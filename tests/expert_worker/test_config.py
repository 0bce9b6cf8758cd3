"""Settings that cannot be."""

from __future__ import annotations

import pytest

from expert_worker.config import ExpertWorkerSettings
from grokmoe.errors import ConfigError


@pytest.mark.parametrize("field", ["capacity", "threads", "max_rows", "max_batch_rows"])
def test_settings_refuse_what_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ExpertWorkerSettings(**{field: -1})

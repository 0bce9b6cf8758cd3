"""The end of a rank that cannot go on: at once, whatever its threads are waiting for."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""As sysexits.h has it for an internal failure; distinct from 1, a start that was refused."""


def end_process(reason: str) -> NoReturn:
    """Says why and ends the process, without waiting for anything.

    A rank in the middle of a collective cannot be called back, and there is nothing to save: who waits for the worker's
    answers finds its streams broken, at once, and computes the sequences elsewhere.
    """
    logger.critical("%s: this process ends", reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(EXIT_CODE)

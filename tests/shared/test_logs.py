"""The log: lines for people and objects for programs, both with what they are about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from grokmoe.logs import JsonFormatter, LogSettings, TextFormatter, about, note

FORMATTERS = {"text": TextFormatter(), "json": JsonFormatter("router")}


@pytest.fixture(params=FORMATTERS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def log(form: str) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of its own, and what it writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATTERS[form])
    logger = logging.getLogger("test.logs")
    logger.propagate = False
    logger.setLevel("DEBUG")
    logger.addHandler(handler)
    yield logger, stream
    logger.removeHandler(handler)


def test_a_line_says_what_its_task_is_about(form: str, log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log

    async def call(name: str, trace_id: str) -> None:
        note(request_id=name, trace_id=trace_id)
        await asyncio.sleep(0)
        logger.warning("within %s", name, extra=about(request_ids=["x", "y"], nothing=""))

    async def both() -> None:
        await asyncio.gather(call("a", "t"), call("b", ""))
        logger.info("after")

    asyncio.run(both())
    lines = stream.getvalue().splitlines()
    if form == "text":
        assert [line.partition("test.logs: ")[2] for line in lines] == [
            "within a [request_id=a trace_id=t request_ids=x,y]",
            "within b [request_id=b request_ids=x,y]",
            "after",
        ]
        return
    first, second, last = map(json.loads, lines)
    assert (first["message"], first["level"], first["logger"]) == ("within a", "warning", "test.logs")
    assert (first["request_id"], first["trace_id"], first["request_ids"]) == ("a", "t", ["x", "y"])
    assert second["request_id"] == "b"
    assert "trace_id" not in second
    assert not {"request_id", "trace_id", "nothing"} & set(last)
    assert last["service"] == "router"


def test_an_object_is_one_line_whatever_is_in_it(form: str, log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    try:
        raise ValueError('two\nlines and a "quote"')
    except ValueError:
        logger.exception("it\nfailed: %s", "ü", extra=about(what=ValueError))
    if form == "json":
        (line,) = stream.getvalue().splitlines()
        told = json.loads(line)
        assert told["message"] == "it\nfailed: ü"
        assert told["exception"].startswith("Traceback")
        assert 'two\nlines and a "quote"' in told["exception"]
        assert told["what"] == "<class 'ValueError'>"
        assert len(told["time"]) == len("2026-01-31T12:00:00.000Z")
    else:
        assert "Traceback" in stream.getvalue()


def test_everything_a_process_says_is_an_object() -> None:
    """Progress, warnings of libraries, the line that says why it cannot start."""
    program = (
        "import sys, warnings\n"
        "from grokmoe.logs import LogSettings, complain, log_to_stderr, say\n"
        "log_to_stderr(LogSettings('error', 'json'), 'test')\n"
        "say('half way')\n"
        "warnings.warn('careful')\n"
        "complain('test', 'the end')\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in told.stderr.splitlines()]
    # Progress is told at any level; a warning is below this one.
    assert [line["message"] for line in lines] == ["half way", "the end"]
    assert [line["level"] for line in lines] == ["info", "critical"]


def test_a_role_that_cannot_start_says_so_in_the_same_form() -> None:
    command = [sys.executable, "-m", "expert_worker", "--model", "/nowhere", "--log-format", "json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 1
    assert "/nowhere" in json.loads(told.stderr.splitlines()[-1])["message"]


def test_fields_are_handed_on() -> None:
    assert LogSettings("debug", "json").logs() == {"log_level": "debug", "log_format": "json"}

"""Processes in network namespaces, and with their log on a full disk."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.network import Cables
from grokmoe.settings import child_environment

CHILD = (sys.executable, "-m", "benchmarks.chaos.child")
ROOT = Path(__file__).resolve().parents[2]
PORT = 7999
"""Of the namespace's own, so nobody else's."""

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def server_in(namespace: str) -> Iterator[None]:
    """An HTTP server in a namespace, once it listens."""
    command = [*CHILD, f"--namespace={namespace}", "http.server", str(PORT)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert "Serving" in process.stdout.readline()
            yield
        finally:
            process.kill()


def test_a_cable_can_be_pulled_out_and_put_back() -> None:
    if not Cables.is_possible():
        pytest.skip("this machine does not let us make network namespaces")
    cables = Cables()
    try:
        name, host = cables.add()
        with server_in(name):
            socket.create_connection((host, PORT), timeout=5.0).close()
            cables.plug(name, False)
            with pytest.raises(OSError, match=r"timed out|No route"):
                socket.create_connection((host, PORT), timeout=0.3)
            cables.plug(name, True)
            socket.create_connection((host, PORT), timeout=5.0).close()
    finally:
        cables.close()
    assert name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_a_stopped_process_does_not_outlive_its_parent() -> None:
    script = f"import subprocess; subprocess.run({[*CHILD, 'http.server', '0']!r})"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=child_environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert "Serving" in parent.stdout.readline()
        (pid,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        child = os.pidfd_open(int(pid))
        signal.pidfd_send_signal(child, signal.SIGSTOP)
        parent.kill()
        assert select.select([child], [], [], 30.0)[0], "it is still there"
        os.close(child)


def test_a_full_disk_takes_no_log() -> None:
    command = [*CHILD, "--stderr=/dev/full", "platform"]  # says something on standard output
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout
    command = [*CHILD, "--stderr=/dev/full", "expert_worker"]  # complains of a missing flag
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (told.stderr, told.returncode != 0) == ("", True)

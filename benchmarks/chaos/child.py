"""Becomes a role's process under other circumstances: `python -m benchmarks.chaos.child [options] MODULE FLAGS`.

The process id stays the same, so whoever started it can send signals to the role. When that parent dies, so does the
role, at once and even while it is stopped: a process that hangs on purpose would never notice otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Linux's prctl: the signal that the end of the parent sends. It outlives exec."""


def main() -> None:
    """Never returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespace", default="", help="network namespace to run in (ip netns)")
    parser.add_argument("--stderr", default="", help="file that gets standard error, such as /dev/full")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what `python -m` runs, and its flags")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if options.stderr:
        os.dup2(os.open(options.stderr, os.O_WRONLY), 2)
    command = [sys.executable, "-m", *options.command]
    if options.namespace:
        command = ["ip", "netns", "exec", options.namespace, *command]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

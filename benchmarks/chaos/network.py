"""Network namespaces with one virtual cable each, that can be pulled out. Linux, as root, with iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess

MAX_CABLES = 64
"""A process has 256 addresses to itself, chosen by its id, and a cable takes four."""


class Cables:
    """A namespace per worker. `is_possible` says whether this machine lets us make them."""

    def __init__(self) -> None:
        self._names: list[str] = []

    @staticmethod
    def is_possible() -> bool:
        """Tries it."""
        if shutil.which("ip") is None:
            return False
        name = f"chaos-try-{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
        if made:
            subprocess.run(["ip", "netns", "delete", name], check=True)
        return made

    def add(self) -> tuple[str, str]:
        """Makes one. Returns its name and the host address of a process inside."""
        number = len(self._names)
        assert number < MAX_CABLES, "no addresses left"
        name = f"chaos-{os.getpid()}-{number}"
        subnet = f"10.{192 + os.getpid() // 256 % 64}.{os.getpid() % 256}"
        here, there = f"{subnet}.{4 * number + 1}", f"{subnet}.{4 * number + 2}"
        near, far = f"cn{os.getpid()}-{number}", "far"  # an interface's name has at most 15 letters
        _ip("netns", "add", name)
        self._names.append(name)
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("address", "add", f"{here}/30", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", name, "address", "add", f"{there}/30", "dev", far)
        _ip("-n", name, "link", "set", "lo", "up")
        self.plug(name, True)
        return name, there

    @staticmethod
    def plug(name: str, is_in: bool) -> None:
        """Connects or cuts off a namespace. What is sent to it meanwhile vanishes; nobody is told."""
        _ip("-n", name, "link", "set", "far", "up" if is_in else "down")

    def close(self) -> None:
        """Removes them all; the cables go with them."""
        while self._names:
            _ip("netns", "delete", self._names.pop())


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)

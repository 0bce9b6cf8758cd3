"""The error of a command line that cannot be."""

from __future__ import annotations


class UsageError(Exception):
    """Its text is for whoever wrote the command line, or the values it was made from."""

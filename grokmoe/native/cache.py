"""Where compiled loops are kept between processes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import llvmlite
import numba

FOLDER_VARIABLE = "GROKMOE_NATIVE_CACHE"
"""Names the folder, which must be one that can be written to. What is in it serves CPUs of one kind."""


def cache_folder() -> str:
    """One folder per state of the loops' sources: numba itself looks at the file of a function only, not at those of
    the functions that it calls."""
    root = os.environ.get(FOLDER_VARIABLE) or _default_root()
    return str(Path(root) / f"{_sources()}-{numba.__version__}-{llvmlite.__version__}")


def _default_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "grokmoe" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"grokmoe-native-{os.getuid()}"


def _sources() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

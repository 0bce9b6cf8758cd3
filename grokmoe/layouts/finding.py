"""Which layout a directory has."""

from __future__ import annotations

from pathlib import Path

from grokmoe.errors import CheckpointError
from grokmoe.layouts.gguf_files import GgufFiles
from grokmoe.layouts.jax_release import JaxRelease
from grokmoe.layouts.layout import Layout
from grokmoe.layouts.mapped_file import file_error
from grokmoe.layouts.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFiles, TensorParallelFiles

LAYOUTS = (SafetensorsFiles, TensorParallelFiles, JaxRelease, GgufFiles)
"""In this order: of what a directory has beside safetensors, nothing is looked at."""


def find(directory: Path) -> Layout | None:
    """The layout of a directory, None when it has none that is known. Raises CheckpointError for half of one."""
    for kind in LAYOUTS:
        layout: Layout | None = kind.find(directory)
        if layout is not None:
            return layout
    return None


def nothing_found(directory: Path) -> CheckpointError:
    """What is to be said of a directory in which `find` has found nothing."""
    others = ", ".join(sorted(path.name for path in directory.glob("*.safetensors"))[:3])
    wanted = f"{SINGLE_FILE} or {INDEX_FILE}, *-TP-*.safetensors, tensor00000_000 or *.gguf"
    return file_error(directory, wanted, f"neither, but {others}" if others else "neither")

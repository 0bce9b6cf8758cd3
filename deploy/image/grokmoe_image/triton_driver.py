"""The one part of Triton that a C compiler makes, its binding to the GPU's driver: built with the image, not in a pod.

Triton looks for the binding in its cache under a hash of its source. The image carries a cache that has it, and a pod
begins with a copy: the cache itself must be writable, for the kernels, which need no C compiler.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

SEED = "GROKMOE_IMAGE_TRITON_SEED"
"""The variable with the image's cache; only an image for GPUs has it."""

CACHE = "TRITON_CACHE_DIR"
"""Triton's own variable."""


def seed(environ: Mapping[str, str]) -> None:
    """Copies the image's cache to where Triton looks, unless it is there already."""
    source, target = environ.get(SEED), environ.get(CACHE)
    if source and target:
        shutil.copytree(source, target, dirs_exist_ok=True)


def build(folder: Path) -> Path:
    """Compiles the binding into Triton's cache, which is `folder`, and returns its path. Needs no GPU.

    It needs a C compiler and a libcuda.so.1 to link with, which may be empty. Then it cannot be loaded: that it was
    made is what counts here.
    """
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src, platform_key

    knobs.cache.dir = str(folder)
    # A part of the hash is what the program `file` says of Python, if there is one. In a pod there is none. Triton
    # remembers the answer.
    path = os.environ["PATH"]
    os.environ["PATH"] = "/nowhere"
    platform_key()
    os.environ["PATH"] = path
    try:
        compile_module_from_src(
            src=(Path(driver.__file__).parent / "driver.c").read_text(),
            name="cuda_utils",
            library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
    except ImportError as error:
        print(f"not loaded, as expected without a driver: {error}", file=sys.stderr)
    return next(folder.rglob("cuda_utils*.so"))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

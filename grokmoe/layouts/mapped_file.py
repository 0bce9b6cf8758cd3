"""A file of tensors that is mapped where and while it is read.

It is not kept open: a checkpoint may have more files than a process may open. That it is still the file whose header
was read is seen by its identity.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grokmoe.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]


def tensor_error(name: str, path: Path, expected: object, found: object) -> CheckpointError:
    """The one form of a complaint about a tensor."""
    return CheckpointError(f"tensor {name} in {path}: expected {expected}, found {found}")


def file_error(path: Path, expected: object, found: object) -> CheckpointError:
    """The one form of a complaint about a file as a whole."""
    return CheckpointError(f"{path}: expected {expected}, found {found}")


@dataclasses.dataclass(frozen=True)
class MappedFile:
    """A file as it was when it was looked at. size: in bytes. identity: device, inode and time of the last change."""

    path: Path
    size: int
    identity: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path, descriptor: int) -> MappedFile:
        """The open file `descriptor`, which was found at `path`."""
        status = os.fstat(descriptor)
        return cls(path, status.st_size, (status.st_dev, status.st_ino, status.st_mtime_ns))

    def map(self, begin: int, end: int, name: str) -> Bytes:
        """Bytes [begin, end), not to be written to; mapped until nobody has them any more.

        name: of the tensor they belong to, for the error. Raises CheckpointError when the file is no longer there or
        no longer the same: reading beyond the end of a mapped file would kill the process.
        """
        try:
            with self.path.open("rb") as file:
                now = MappedFile.of(self.path, file.fileno())
                if now.size < end:
                    raise tensor_error(name, self.path, f"at least {end} bytes, as when opened", f"{now.size} bytes")
                if now != self:
                    found = "one that was changed or put in its place"
                    raise tensor_error(name, self.path, "the file that was opened", found)
                if begin == end:
                    return np.empty(0, np.uint8)
                page = begin % mmap.ALLOCATIONGRANULARITY
                mapped = mmap.mmap(file.fileno(), page + end - begin, access=mmap.ACCESS_READ, offset=begin - page)
        except OSError as error:
            raise tensor_error(name, self.path, "the file that was opened", error.strerror) from error
        return np.frombuffer(mapped, np.uint8, end - begin, page)

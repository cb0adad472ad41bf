"""Making sure that what was written stays written."""

import os
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Makes sure that a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(file: BinaryIO, size: int) -> None:
    """Makes a new file so many bytes long, on the disk: one that is mapped could not say later that there is no room.

    Raises:
        OSError: there is no room.
    """
    if size and hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)

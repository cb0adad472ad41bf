"""Which files there are, and making sure that what was written stays written."""

import os
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

# What a tokenizer may consist of, in a model's folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder: those that have names, for tools, say


def expanded(path: Path) -> Path:
    """Returns a path whose ``~`` no shell has expanded, as in ``--out=~/NAME``; UserError where it leads nowhere."""
    try:
        path = path.expanduser()
        path.resolve()
    except (RuntimeError, ValueError) as error:  # no such user, links in a circle, no name at all
        raise UserError(f"{path} leads nowhere: {error}") from error
    return path


def require_readable(path: Path) -> None:
    """Raises UserError where a file is there and closed to us, for safetensors says that it is not there."""
    if path.is_file() and not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read: permission denied")


def size_text(size: float) -> str:
    """Returns a number of bytes as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def onnx_files(folder: Path) -> list[Path]:
    """Returns the models in a folder, or the one of a folder of Triton's model repository."""
    triton = folder / "1" / "model.onnx"
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".onnx")
    return files or ([triton] if triton.is_file() else [])


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

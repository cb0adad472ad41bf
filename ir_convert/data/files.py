"""Files and folders: which of them hold text, and where in them a section begins."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from ..errors import UserError
from .formats import File, JsonLines, Parquet, TextFile, reading
from .pieces import Pieces

LEAST_SECTION = 16384
JSON_LINES = (".jsonl", ".jsonlines", ".json-lines", ".ndjson")
# A file so named in a folder is meant to be text: an encoding other than UTF-8 is an error there, and no reason to skip.
TEXT = (".txt", ".text", ".md", ".rst")


class Files:
    """A reader of one file, or of a folder's files one after another."""

    def __init__(self, name: str, files: list[File]):
        self.name, self._files = name, files
        self._size = sum(file.size for file in files)

    def sections(self, count: int) -> list[Pieces]:
        count = max(1, min(count, self._size // LEAST_SECTION))
        edges = [index * self._size // count for index in range(count + 1)]
        return [self._read(start, end) for start, end in pairwise(edges)]

    def _read(self, start: int, end: int) -> Pieces:
        for file in self._files:
            if end <= 0:
                return
            if start < file.size:
                yield from file.read(max(start, 0), min(end, file.size))
            start, end = start - file.size, end - file.size


def open_path(path: Path, name: str, field: str) -> Files:
    """Opens a file, or a folder with all the text in it, hidden files left out.

    Args:
        path: exists.
        name: what reports call it.
        field: where JSON lines and Parquet files keep their text.

    Raises:
        UserError: unreadable, or a folder without text.
    """
    with reading(path):
        if not path.is_file() and not path.is_dir():
            raise UserError(f"calibration text {path} is neither a file nor a folder")
        paths = [path] if path.is_file() else [file for file in sorted(_walk(path)) if _is_text(file)]
        # Among others a .json file is one of many things; by itself, or among its like, it is meant as records.
        records = all(file.suffix.lower() == ".json" for file in paths)
        files = [JsonLines(file, field) if records else _open_file(file, field) for file in paths]
    if not files:
        raise UserError(f"calibration folder {path} holds no text file: UTF-8 text, JSON lines (.jsonl) or .parquet")
    return Files(name, files)


def _open_file(path: Path, field: str) -> File:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return Parquet(path, field)
    if name.removesuffix(".gz").endswith(JSON_LINES):
        return JsonLines(path, field)
    return TextFile(path)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file())


def _raise(error: OSError) -> None:
    raise error


def _is_text(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith((".parquet", *TEXT)) or name.removesuffix(".gz").endswith(JSON_LINES):
        return True
    with path.open("rb") as file:
        head = file.read(4096)
    try:
        return "\0" not in head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the 4096 bytes cut in two is no sign of anything.
        return error.reason == "unexpected end of data" and b"\0" not in head

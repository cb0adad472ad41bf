"""Text in one file: plain, JSON lines or Parquet. Only the stretches asked for are read."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import UserError, one_line, reason
from .pieces import Piece, Pieces, document, no_such_field

CHUNK = 65536
STARTS_PER_ROW_GROUP = 8
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")


class File(Protocol):
    """A file of ``size`` bytes."""

    size: int

    def read(self, start: int, end: int) -> Pieces:
        """Yields what begins in bytes [start, end); adjoining ranges neither overlap nor leave a gap."""


class TextFile:
    """Plain UTF-8 text: one document."""

    def __init__(self, path: Path):
        self._path = path
        self.size = path.stat().st_size

    def read(self, start: int, end: int) -> Pieces:
        with reading(self._path), self._open() as file:
            start, end = _line_start(file, start, CHUNK), _line_start(file, end, CHUNK)
            begins = start == 0
            while start < end:
                stop = min(end, _line_start(file, start + CHUNK, CHUNK))
                file.seek(start)
                if text := self._decode(file.read(stop - start), start):
                    yield Piece(text, begins)
                    begins = False
                start = stop

    def _open(self) -> BinaryIO:
        return self._path.open("rb")

    def _decode(self, data: bytes, start: int) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            unpack = ": unpack it first" if self._path.suffix.lower() in COMPRESSED else ""
            byte = start + error.start
            raise UserError(f"calibration text {self._path} is not UTF-8 text (byte {byte}){unpack}") from error
        if "\0" in text:
            raise UserError(f"calibration text {self._path} is binary: it holds a NUL character")
        return text.removeprefix("\ufeff") if text.strip("\ufeff \t\r\n") else ""


class Builtin(TextFile):
    """Text that is in memory already."""

    def __init__(self, text: str):
        self._data = text.encode()
        self.size, self._path = len(self._data), Path("built in")

    def _open(self) -> BinaryIO:
        return io.BytesIO(self._data)


class JsonLines:
    """A JSON object a line, each a document. Gzipped it has no middle to start from: the first section gets it all."""

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        self._zipped = path.suffix.lower() == ".gz"
        self.size = path.stat().st_size

    def read(self, start: int, end: int) -> Pieces:
        if self._zipped and start:
            return
        with reading(self._path), self._open() as file:
            if self._zipped:
                position, stop = 0, None
            else:
                position, stop = _line_start(file, start), _line_start(file, end)
                file.seek(position)
            while (stop is None or position < stop) and (line := file.readline()):
                if line.strip() and (text := self._parse(line, position)).strip():
                    yield Piece(text, True)
                position += len(line)

    def _open(self) -> BinaryIO:
        return gzip.open(self._path) if self._zipped else self._path.open("rb")  # type: ignore[return-value]

    def _parse(self, line: bytes, position: int) -> str:
        if not position and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise UserError(
                f"{self._path} is one JSON array, and is read as JSON lines: make them of it, one record a line "
                "(jq -c '.[]' FILE > FILE.jsonl)"
            )
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path} is not UTF-8 text (byte {position + error.start})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self._path}: the line at byte {position} is not JSON, of which every line must be one record: {error}"
            ) from error
        return document(record, self._field, f"{self._path}, line at byte {position}")


class Parquet:
    """A row, a document. A section begins at an eighth of a row group, as nearer means decoding what lies before."""

    def __init__(self, path: Path, field: str):
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
        self._path, self._field = path, field
        self.size = path.stat().st_size
        self._parquet, self._error = parquet, ArrowException
        with self._open() as file:
            if field not in (names := file.schema_arrow.names):
                raise no_such_field(field, names, str(path))

    def read(self, start: int, end: int) -> Pieces:
        with self._open() as file:
            groups, before = file.metadata, 0
            for group in range(groups.num_row_groups):
                rows = groups.row_group(group).num_rows
                step = -(-rows // STARTS_PER_ROW_GROUP) or 1
                for first in range(0, rows, step):
                    if start * groups.num_rows <= (before + first) * self.size < end * groups.num_rows:
                        yield from self._rows(file, group, first, min(first + step, rows))
                before += rows

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Opens for one reading: a folder may hold more files than a process may have open."""
        with reading(self._path):
            try:
                with self._parquet.ParquetFile(self._path) as file:
                    yield file
            except (self._error, UnicodeDecodeError) as error:
                raise UserError(f"{self._path} is not a sound Parquet file: {one_line(error)}") from error

    def _rows(self, file: Any, group: int, first: int, stop: int) -> Pieces:
        row = 0
        for batch in file.iter_batches(64, [group], [self._field]):
            for record in batch.to_pylist()[max(0, first - row) : stop - row]:
                if (text := document(record, self._field, str(self._path))).strip():
                    yield Piece(text, True)
            row += len(batch)
            if row >= stop:
                return


def _line_start(file: BinaryIO, position: int, within: int = -1) -> int:
    """Returns the first line start at or after ``position``; with none ``within`` bytes, the next character's."""
    if position <= 0:
        return 0
    file.seek(position - 1)
    line = file.readline(within)
    if within < 0 or line.endswith(b"\n") or len(line) < within:
        return position - 1 + len(line)
    continuation = next((index for index, byte in enumerate(line[1:5]) if byte & 0xC0 != 0x80), 0)
    return position + continuation


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what can go wrong with a file into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        file = getattr(error, "filename", None) or path
        raise UserError(f"cannot read the calibration text {file}: {reason(error)}") from error

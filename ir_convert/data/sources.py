"""Where calibration text comes from: what the user writes, and how it is told what that means."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from ..errors import UserError
from .files import Files, open_path
from .formats import Builtin
from .hub import open_dataset
from .pieces import Reader

DATA_SET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/\\:]*){0,2}")
SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,6}$")


@dataclass(frozen=True)
class Source:
    """Some text, and its share of the whole.

    Attributes:
        location: a text file, a folder, a .jsonl or .parquet file; or a data set: ``name``, ``name:config``,
            ``name:config:split``. What exists locally is never looked for on the Hub.
        weight: share of the calibration tokens, relative to the other sources' weights; above 0.
    """

    location: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Reads ``location`` or ``location=weight``; a path that exists is taken whole, whatever ends it.

        Raises:
            UserError: no location, or a weight that is not above 0.
        """
        location, equals, tail = text.rpartition("=")
        try:
            weight = float(tail) if equals else None
        except ValueError:
            weight = None
        if weight is None or local_path(text):
            location, weight = text, 1.0
        if not location.strip():
            raise UserError(f"calibration source '{text}' names no text: give a file, a folder or a data set")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"weight {tail} of calibration source '{location}' is not a number above 0")
        return cls(location, weight)


def open_sources(sources: Sequence[Source], field: str) -> list[Reader]:
    """Opens what ``sources`` name; with none, the documentation topics that come with Python.

    Raises:
        UserError: one of them cannot be read, or two of them share text, which would be in more than one part then.
    """
    if not sources:
        return [Files("Python's documentation topics", [Builtin("\n\n".join(topics.values()))])]
    _refuse_overlap([(source.location, local_path(source.location)) for source in sources])
    readers = [_open(source.location, field) for source in sources]
    # Two spellings of one data set show once it is open.
    _refuse_overlap([(reader.name, None) for reader in readers])
    return readers


def _refuse_overlap(places: Sequence[tuple[str, Path | None]]) -> None:
    seen: dict[Path | str, str] = {}
    for location, path in places:
        place = path.resolve() if path else location
        around = {place, *place.parents} if isinstance(place, Path) else {place}
        for other, name in seen.items():
            if other in around or (isinstance(other, Path) and place in other.parents):
                raise UserError(f"calibration sources '{name}' and '{location}' overlap: leave one out")
        seen[place] = location


def _open(location: str, field: str) -> Reader:
    if path := local_path(location):
        return open_path(path, location, field)
    name, colon, more = location.partition(":")
    in_folder = colon and "/" not in more and local_path(name)
    if not in_folder and (not DATA_SET.fullmatch(location) or SUFFIX.search(name)):
        raise UserError(f"calibration text {location} does not exist")
    return open_dataset(f"{in_folder}:{more}" if in_folder else location, field)


def local_path(location: str) -> Path | None:
    """Returns the file or folder at ``location``, if there is one."""
    try:
        path = Path(location).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, a folder closed to us, no such user
        return None

"""What every kind of source gives: sections of text, each read only as far as somebody asks."""

from collections.abc import Generator, Mapping
from typing import NamedTuple, Protocol

from ..errors import UserError


class Piece(NamedTuple):
    """A stretch of text that is not blank; ``begins`` says that a document begins with it."""

    text: str
    begins: bool


Pieces = Generator[Piece, None, None]


class Reader(Protocol):
    """An opened source; ``name`` is what reports call it."""

    @property
    def name(self) -> str: ...

    def sections(self, count: int) -> list[Pieces]:
        """Parts the source into at most ``count`` evenly spaced sections that together are the whole of it."""


def document(record: object, field: str, where: str) -> str:
    """Returns the text of one record of a data set; "" where the field is null.

    Raises:
        UserError: the record has no such field, or there is no text in it.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a record is {type(record).__name__}, not an object with fields")
    if field not in record:
        raise no_such_field(field, list(record), where)
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' holds {type(text).__name__}, not text: choose another --text-field")
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode()


def no_such_field(field: str, fields: list[str], where: str) -> UserError:
    """Returns the error that names the fields there are."""
    return UserError(f"{where} has no field '{field}', but: {', '.join(map(str, fields))}; choose with --text-field")

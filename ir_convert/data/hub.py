"""Text in data sets, on the Hub or in a local data set folder, streamed by the datasets library."""

from typing import Any

from ..errors import UserError, one_line
from .pieces import Piece, Pieces, document, no_such_field

DEFAULT_SPLITS = ("train", "validation")
# Every shard that is opened is a download that is begun.
MOST_SHARDS = 8


class DataSet:
    """A reader of one split; its sections are shards, each read from its beginning in the order it is stored."""

    def __init__(self, name: str, split: Any, field: str):
        columns = split.column_names
        if columns is not None:
            if field not in columns:
                raise no_such_field(field, columns, f"data set {name}")
            # The other columns may be images, and costly to decode.
            split = split.select_columns([field])
        self.name, self._split, self._field = name, split, field

    def sections(self, count: int) -> list[Pieces]:
        count = max(1, min(count, self._split.num_shards, MOST_SHARDS))
        return [self._read(self._split.shard(num_shards=count, index=index)) for index in range(count)]

    def _read(self, rows: Any) -> Pieces:
        rows = iter(rows)
        while True:
            try:
                record = next(rows, None)
            except Exception as error:  # the library raises whatever its file readers and HTTP clients raise
                raise UserError(f"reading the data set {self.name} failed: {one_line(error)}") from error
            if record is None:
                return
            if (text := document(record, self._field, f"data set {self.name}")).strip():
                yield Piece(text, True)


def open_dataset(location: str, field: str) -> DataSet:
    """Opens ``name``, ``name:config`` or ``name:config:split``, without downloading more than its table of contents.

    Args:
        location: config may be empty; without a split it is train, or validation where there is no train.
        field: the column with the text.

    Raises:
        UserError: the library is not installed, or there is no such data set, configuration, split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"there is no file or folder '{location}'; to read it as a data set: pip install datasets"
        ) from error
    name, config, split = (*location.split(":", 2), "", "")[:3]
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # not found, no such config, no network, gated: each comes with a class of its own
        raise UserError(
            f"there is no file or folder '{location}', and it cannot be loaded as a data set: {one_line(error)}"
        ) from error
    wanted = [split] if split else [default for default in DEFAULT_SPLITS if default in splits]
    if not wanted or wanted[0] not in splits:
        raise UserError(
            f"data set {name} has no split {split or ' or '.join(DEFAULT_SPLITS)}, but: {', '.join(splits)}; "
            f"choose with {name}:{config}:SPLIT"
        )
    return DataSet(f"{name}:{config}:{wanted[0]}", splits[wanted[0]], field)

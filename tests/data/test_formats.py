"""JSON lines and Parquet files as calibration text."""

import gzip
import json
import sys

import pytest
from reading import everything, texts

from ir_convert.data.files import open_path
from ir_convert.errors import UserError

WORDS = [f"document {number} {'and more words ' * 40}" for number in range(1000)]


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("count", [1, 3, 16])
def test_json_lines(count, tmp_path):
    records = [{"id": number, "text": text} for number, text in enumerate(WORDS)]
    path = write_lines(tmp_path / "a.jsonl", [*records[:500], {"text": None}, {"text": " "}, *records[500:]])
    assert everything(open_path(path, "a", "text"), count) == WORDS
    assert len(texts(open_path(path, "a", "text"), count)) == count
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert everything(open_path(zipped, "a", "text"), count) == WORDS


def test_endings_in_capitals(tmp_path):
    path = write_lines(tmp_path / "A.JSONL", [{"text": "one"}])
    assert everything(open_path(path, "a", "text")) == everything(open_path(tmp_path, "a", "text")) == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1, "content": "a"}\n', r"has no field 'text', but: id, content; choose with --text-field"),
        (b'{"text": "a"}\n{"text": ["a"]}\n', "byte 14: field 'text' holds list, not text"),
        (b'{"text": "a"}\n["a"]\n', "byte 14: a record is list"),
        (b'{"text": "a"}\n{"text": \n', "the line at byte 14 is not JSON, of which every line must be"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"is not UTF-8 text \(byte 24\)"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "is not JSON"),
    ],
)
def test_bad_json_lines(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        everything(open_path(tmp_path / "a.jsonl", "a", "text"))


def test_a_json_file_is_records(tmp_path):
    path = write_lines(tmp_path / "a.json", [{"text": "one"}, {"text": "two"}])
    assert "".join(everything(open_path(path, "a", "text"))) == "onetwo"
    write_lines(tmp_path / "b.json", [{"text": "three"}])
    assert "".join(everything(open_path(tmp_path, "a", "text"))) == "onetwothree"
    (tmp_path / "c.txt").write_text("four")  # now the others are one of many things
    assert "".join(everything(open_path(tmp_path, "a", "text"))).startswith('{"text": "one"}')


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", ["", "\ufeff", " "])
def test_a_json_array(indent, before, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(before + json.dumps([{"text": "one"} for _ in range(2000)], indent=indent))
    with pytest.raises(UserError, match=r"is one JSON array, .* make them of it, one record a line"):
        everything(open_path(path, "a", "text"), 3)


def test_packed_text_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some words"))
    with pytest.raises(UserError, match=r"a.txt.gz is not UTF-8 text \(byte 1\): unpack it first"):
        everything(open_path(path, "a", "text"))


def test_half_a_character_in_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n')
    assert everything(open_path(tmp_path / "a.jsonl", "a", "text")) == ["a? b"]


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b'{"text": "a"}\n' * 999)[:-20], b""],
    ids=["not gzip", "cut off", "empty"],
)
def test_bad_gzip(content, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    if content:
        with pytest.raises(UserError, match=r"cannot read the calibration text .*a\.jsonl\.gz"):
            everything(open_path(tmp_path / "a.jsonl.gz", "a", "text"))
    else:
        assert everything(open_path(tmp_path / "a.jsonl.gz", "a", "text")) == []


@pytest.mark.parametrize("rows_per_group", [1000, 130, 7])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_parquet(rows_per_group, count, tmp_path):
    columns = {"id": list(range(1001)), "text": [*WORDS, None]}
    path = write_parquet(
        tmp_path / "a.parquet", columns, row_group_size=rows_per_group, compression="none", use_dictionary=False
    )
    reader = open_path(path, "a", "text")
    assert everything(reader, count) == WORDS
    if rows_per_group == 130:
        assert all(texts(reader, count))


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "content": ["a", "b"]})
    with pytest.raises(UserError, match="has no field 'text', but: id, content"):
        open_path(path, "a", "text")
    with pytest.raises(UserError, match="field 'id' holds int"):
        everything(open_path(path, "a", "id"))
    pyarrow = pytest.importorskip("pyarrow")
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"caf\xe9"]).buffers())
    with pytest.raises(UserError, match=r"latin\.parquet is not a sound Parquet file: 'utf-8' codec"):
        everything(open_path(write_parquet(tmp_path / "latin.parquet", {"content": latin}), "latin", "content"))
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(UserError, match="not a sound Parquet file"):
        open_path(path, "a", "content")
    footer = int.from_bytes(data[-8:-4], "little") + 8
    path.write_bytes(data[:4] + b"\xff" * (len(data) - 4 - footer) + data[-footer:])
    with pytest.raises(UserError, match=r"a\.parquet"):
        everything(open_path(path, "a", "content"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow"):
        open_path(tmp_path / "a.parquet", "a", "text")

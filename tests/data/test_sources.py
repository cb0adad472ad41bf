"""What the user writes becomes text, or one clear line."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import everything, texts

from ir_convert.data import Source
from ir_convert.data.files import Files, open_path
from ir_convert.data.formats import Builtin, TextFile
from ir_convert.data.sources import open_sources
from ir_convert.errors import UserError


@pytest.mark.parametrize(
    ("text", "location", "weight"),
    [
        ("a.txt", "a.txt", 1),
        ("a.txt=2", "a.txt", 2),
        ("folder/=0.5", "folder/", 0.5),
        ("name:config:split=1e-3", "name:config:split", 1e-3),
        ("C:\\texts\\a=b.txt", "C:\\texts\\a=b.txt", 1),
        ("C:\\texts\\a=b.txt=3", "C:\\texts\\a=b.txt", 3),
        ("run=1=2", "run=1", 2),
        ("a.txt=", "a.txt=", 1),
    ],
)
def test_weights(text, location, weight):
    assert Source.parse(text) == Source(location, weight)


def test_a_path_that_exists_is_taken_whole(tmp_path):
    path = tmp_path / "run=2"
    path.write_text("text")
    assert Source.parse(str(path)) == Source(str(path), 1)
    assert Source.parse(f"{path}=3") == Source(str(path), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt=0", "weight 0 of calibration source 'a.txt' is not a number above 0"),
        ("a.txt=-1", "weight -1"),
        ("a.txt=nan", "weight nan"),
        ("a.txt=inf", "weight inf"),
        ("", "names no text"),
        ("=2", "names no text"),
    ],
)
def test_bad_sources(text, message):
    with pytest.raises(UserError, match=message):
        Source.parse(text)


@pytest.mark.parametrize(
    "location",
    [
        *("absent.txt", "./absent", "../a/b", "/absent/file", "~/absent/file", "~nobody-by-this-name/x", "a/b/c"),
        *("C:/absent", "C:\\absent", "notes.md", "x\0y", "x" * 5000 + "/y" * 3),
    ],
)
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(location, monkeypatch):
    monkeypatch.setattr("ir_convert.data.sources.open_dataset", lambda *_: pytest.fail("taken for a data set"))
    with pytest.raises(UserError, match="does not exist"):
        open_sources([Source(location)], "text")


@pytest.mark.parametrize(
    "location", ["wikitext", "allenai/c4", "allenai/c4:en", "wikitext:wikitext-2-raw-v1:test", "a-1.5/b::"]
)
def test_what_looks_like_a_name_is_a_data_set(location, monkeypatch):
    monkeypatch.setattr("ir_convert.data.sources.open_dataset", lambda *_: Files("opened", []))
    assert open_sources([Source(location)], "text")[0].name == "opened"


def test_overlapping_sources(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("text")
    whole, inner, file = (Source(str(path)) for path in (tmp_path, tmp_path / "inner", tmp_path / "inner" / "a.txt"))
    (tmp_path / "inner" / "link.txt").symlink_to("a.txt")
    link = Source(str(tmp_path / "inner" / "link.txt"))
    for pair in [(whole, file), (file, whole), (file, file), (inner, whole), (file, link)]:
        with pytest.raises(UserError, match="overlap: leave one out"):
            open_sources(pair, "text")


@given(
    st.text(st.sampled_from("ab \n\u00e4\u20ac\U0001f600"), max_size=300).filter(str.strip),
    st.lists(st.integers(0, 1200), max_size=6),
    st.integers(8, 40),
)
def test_ranges_of_a_text_join_to_the_text(text, edges, chunk):
    """Wherever a range ends, mid-line or mid-character, the next one goes on exactly there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ir_convert.data.formats.CHUNK", chunk)
        file = Builtin(text)
        edges = sorted({0, file.size, *(min(edge, file.size) for edge in edges)})
        pieces = [piece for start, end in pairwise(edges) for piece in file.read(start, end)]
    # Chunks that are blank throughout are left out.
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join(text.split())
    assert sum(piece.begins for piece in pieces) <= 1


def test_a_long_text_without_a_line_end_is_cut_between_characters(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("\u20ac" * 200_000, encoding="utf-8")
    reader = open_path(path, "line", "text")
    sections = texts(reader, 8)
    assert len(sections) == 8
    assert "".join(map("".join, sections)) == "\u20ac" * 200_000
    assert all(len("".join(section)) > 20_000 for section in sections)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    path = tmp_path / "big.txt"
    path.write_text("a line of text\n" * 200_000)
    asked = []
    decode = TextFile._decode
    monkeypatch.setattr(
        TextFile, "_decode", lambda self, data, start: asked.append(len(data)) or decode(self, data, start)
    )
    sections = open_path(path, "big", "text").sections(4)
    assert not asked
    for section in sections:
        next(section)
    assert len(asked) == 4
    assert sum(asked) < path.stat().st_size / 8


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert everything(open_path(tmp_path / "bom.txt", "bom", "text")) == ["hello"]
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert everything(open_path(tmp_path / "bom.jsonl", "bom", "text")) == ["one", "two"]


def test_the_byte_that_is_not_text_is_counted_from_the_start(tmp_path):
    path = tmp_path / "late"
    path.write_bytes(b"a line\n" * 50_000 + b"\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 350000\)"):
        everything(open_path(path, "late", "text"), 5)


def test_folder(tmp_path):
    for name, content in {
        "b.txt": b"second",
        "a.md": b"first",
        "deep/er/c.py": "dritt\u00e4s".encode(),
        "deep/binary.bin": b"\0\1\2",
        "deep/latin": b"caf\xe9 and more",
        "deep/cut": ("x" * 4095 + "\u00e4").encode(),
        "deep/records.jsonl": b'{"text": "a record"}\n',
        ".git/config": b"hidden",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pieces = [piece for section in open_path(tmp_path, "folder", "text").sections(9) for piece in section]
    assert [piece.text for piece in pieces] == ["first", "second", "x" * 4095 + "\u00e4", "dritt\u00e4s", "a record"]
    assert all(piece.begins for piece in pieces)


def test_a_document_begins_behind_blank_lines(tmp_path):
    """Of which there may be whole chunks, and those are left out."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("\n" * 140_000 + "two")
    (section,) = open_path(tmp_path, "folder", "text").sections(1)
    assert [(piece.text.strip(), piece.begins) for piece in section] == [("one", True), ("two", True)]


def test_a_folder_has_sections_across_its_files(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"file {number}\n" * 800)
    reader = open_path(tmp_path, "folder", "text")
    sections = texts(reader, 8)
    assert len(sections) == 8
    assert "".join(map("".join, sections)) == "".join(f"file {number}\n" * 800 for number in range(40))


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="holds no text file"):
        open_path(tmp_path, "folder", "text")
    (tmp_path / "binary").write_bytes(b"\0\1")
    (tmp_path / "cut").write_bytes(b"\0" + b"x" * 4094 + "\u00e4".encode())
    with pytest.raises(UserError, match="holds no text file"):
        open_path(tmp_path, "folder", "text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        everything(open_path(tmp_path, "folder", "text"))

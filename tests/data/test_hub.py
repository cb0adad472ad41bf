"""Data sets through the datasets library, from local folders: the same code that reads from the Hub."""

import json
import sys

import pytest

from ir_convert.data import Source
from ir_convert.data.sources import open_sources
from ir_convert.errors import UserError


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("datasets")
    for split, shards in {"train": 3, "test": 1}.items():
        for shard in range(shards):
            lines = [{"id": row, "text": f"{split} {shard} {row}"} for row in range(5)]
            path = tmp_path / f"{split}-{shard:05}-of-{shards:05}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def read(location, count=1, field="text"):
    return [
        [piece.text for piece in section] for section in open_sources([Source(str(location))], field)[0].sections(count)
    ]


def test_splits(folder):
    train = [f"train {shard} {row}" for shard in range(3) for row in range(5)]
    assert read(f"{folder}:") == [train]
    assert read(f"{folder}::train") == [train]
    assert read(f"{folder}:default:test") == [[f"test 0 {row}" for row in range(5)]]
    assert open_sources([Source(f"{folder}:default")], "text")[0].name == f"{folder}:default:train"


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read(f"~/{folder.name}:default:test") == read(f"{folder}:default:test")


def test_sections_are_shards(folder):
    assert read(f"{folder}:", 9) == [[f"train {shard} {row}" for row in range(5)] for shard in range(3)]
    assert [text for section in read(f"{folder}:", 2) for text in section] == read(f"{folder}:")[0]


def test_parquet(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    columns = {"text": ["a", None, " ", "b"], "id": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "validation.parquet")
    assert read(f"{tmp_path}:") == [["a", "b"]]
    assert open_sources([Source(f"{tmp_path}:")], "text")[0].name == f"{tmp_path}::validation"
    with pytest.raises(UserError, match="has no field 'content', but: text, id; choose with --text-field"):
        read(f"{tmp_path}:", field="content")
    with pytest.raises(UserError, match="field 'id' holds int, not text"):
        read(f"{tmp_path}:", field="id")


def test_missing_split_config_and_field(folder):
    with pytest.raises(UserError, match="has no split dev, but: train, test; choose with"):
        read(f"{folder}::dev")
    with pytest.raises(UserError, match=r"cannot be loaded as a data set: .*'english'"):
        read(f"{folder}:english")
    with pytest.raises(UserError, match="has no field 'content', but: id, text"):
        read(f"{folder}:", field="content")
    for path in folder.glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match="has no split train or validation, but: test"):
        read(f"{folder}:")


def test_one_data_set_spelled_twice(folder):
    with pytest.raises(UserError, match="overlap"):
        open_sources([Source(f"{folder}:"), Source(f"{folder}::train")], "text")


def test_a_shard_that_breaks_off(folder):
    (folder / "train-00001-of-00003.jsonl").write_text('{"id": 1, "text": "a"}\n{"id"')
    with pytest.raises(UserError, match=r"reading the data set .* failed: \S"):
        read(f"{folder}:")


@pytest.mark.parametrize("name", ["no-such-data-set-here", "nobody/no-such-data-set-here:config"])
def test_unreachable(name, monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # no network, and no minute of retries
    with pytest.raises(
        UserError, match=f"no file or folder '{name}', and it cannot be loaded as a data set: \\S"
    ) as error:
        read(name)
    assert "\n" not in str(error.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"no file or folder 'wikitext'.*pip install datasets"):
        read("wikitext")

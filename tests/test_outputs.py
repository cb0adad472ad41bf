"""Outputs: told apart by name, checked before any work, written whole or not at all."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from models import random_routing, save_random
from safetensors import SafetensorError

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.files import TEMPLATES
from ir_convert.outputs import Output, check_outputs
from ir_convert.progress import Silent
from ir_convert.quantisation import Quantisation
from ir_convert.writing import Writing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    save_random("llama", path)
    return Checkpoint.open(str(path))


def check(checkpoint, *paths, overwrite=False, size=1000):
    check_outputs([Output.parse(Path(path)) for path in paths], checkpoint, overwrite, lambda output: size)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.onnx", "onnx"),
        ("b.safetensors", "routing"),
        ("M.ONNX", "onnx"),
        ("c", "hf"),
        ("Llama-3.2-ir", "hf"),
        ("d/", "hf"),
    ],
)
def test_kind_by_name(name, kind):
    assert Output.parse(Path(name)).kind == kind


@pytest.mark.parametrize(("name", "kind"), [("a.onnx", "onnx"), ("b.safetensors", "routing"), ("c", "triton")])
def test_target_is_of_folders(name, kind):
    assert Output.parse(Path(name), "triton").kind == kind


@pytest.mark.parametrize("name", ["m.gguf", "notes.TXT", ".onnx", "deep/.safetensors"])
def test_foreign_format(name):
    with pytest.raises(UserError, match=f"'{name}' is of no known kind"):
        Output.parse(Path(name))


@pytest.mark.parametrize(
    "existing", ["m.onnx", "m.onnx.data", "config.json", "genai_config.json", "m.routing.safetensors"]
)
def test_nothing_that_exists_is_overwritten_unasked(existing, checkpoint, tmp_path):
    (tmp_path / existing).write_text("mine")
    with pytest.raises(UserError, match=f"{existing} exists.*--overwrite"):
        check(checkpoint, tmp_path / "m.onnx")
    check(checkpoint, tmp_path / "m.onnx", overwrite=True)
    assert (tmp_path / existing).read_text() == "mine"


def test_existing_folder(checkpoint, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match="exists"):
        check(checkpoint, folder)
    check(checkpoint, folder, overwrite=True)
    for kept in ("thesis.txt", "config.json"):  # another model's checkpoint is not ours to remove
        (folder / kept).write_text("{}")
        with pytest.raises(UserError, match="is not a checkpoint that ir-convert wrote; it is not overwritten"):
            check(checkpoint, folder, overwrite=True)
    (folder / "routing.safetensors").write_text("")
    with pytest.raises(UserError, match=r"also holds 'thesis.txt', which would be lost"):
        check(checkpoint, folder, overwrite=True)
    (folder / "thesis.txt").unlink()
    for own in ("model-00001-of-00002.safetensors", "modeling_ir.py", "tokenizer.json", "README.md"):
        (folder / own).write_text("")
    check(checkpoint, folder, overwrite=True)
    for name in (".git", "eval", "adapter.safetensors"):  # the user's own
        (folder / name).mkdir()
        with pytest.raises(UserError, match=f"also holds '{name}', which would be lost"):
            check(checkpoint, folder, overwrite=True)
        (folder / name).rmdir()


def test_another_models_configuration_is_not_lost(checkpoint, tmp_path):
    shutil.copytree(checkpoint.path, tmp_path / "other")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds another model, whose config\.json would be lost"):
            check(checkpoint, tmp_path / "other" / "m.onnx", overwrite=overwrite)
    for weights in ("pytorch_model.bin", "adapter_config.json"):
        (tmp_path / weights).mkdir()
        (tmp_path / weights / weights).touch()
        check(checkpoint, tmp_path / weights / "m.onnx")
        (tmp_path / weights / "generation_config.json").touch()
        with pytest.raises(UserError, match=r"holds another model, whose generation_config\.json would be lost"):
            check(checkpoint, tmp_path / weights / "m.onnx", overwrite=True)


def test_nothing_of_the_model_before_is_left_beside(checkpoint, tmp_path):
    """It would be read as the new one's: where texts end, how they are put to it."""
    left = [tmp_path / name for name in ("generation_config.json", "chat_template.jinja")]
    for file in (*left, tmp_path / "notes.txt"):
        file.write_text("before")
    (tmp_path / TEMPLATES).mkdir()
    (tmp_path / TEMPLATES / "tool_use.jinja").write_text("before")
    with pytest.raises(UserError, match=r"generation_config.json exists: .*m.onnx wants a folder that no other model"):
        check(checkpoint, tmp_path / "m.onnx")
    check(checkpoint, tmp_path / "m.onnx", overwrite=True)
    Output.parse(tmp_path / "m.onnx").write(lambda folder: (folder / "m.onnx").write_text("new") and None)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "notes.txt"]


@pytest.mark.parametrize(("name", "inside"), [("m.onnx", ""), ("m", ""), ("m", "1")])
def test_named_chat_templates_come_along(checkpoint, tmp_path, name, inside):
    base = shutil.copytree(checkpoint.path, tmp_path / "base")
    (base / TEMPLATES).mkdir()
    (base / TEMPLATES / "tool_use.jinja").write_text("tools: {{ tools }}")
    checkpoint = Checkpoint.open(str(base))
    (tmp_path / "there").mkdir()
    output = Output.parse(tmp_path / "there" / name, "triton" if inside else "hf")
    place = output.path if output.is_folder else output.path.parent
    assert not output.is_whole(checkpoint)
    for _ in range(2):  # the second replaces the first
        writing = Writing([output], "auto", Quantisation(), trace=False, logits="all", overwrite=True)
        writing.write(checkpoint, random_routing(checkpoint), Silent())
        assert (place / inside / TEMPLATES / "tool_use.jinja").read_text() == "tools: {{ tools }}"
        assert output.is_whole(checkpoint)
    (place / inside / TEMPLATES / "tool_use.jinja").unlink()
    assert not output.is_whole(checkpoint)


def test_a_name_that_is_no_text():
    with pytest.raises(UserError, match=r"output name 'm\\udcff.onnx' is not UTF-8"):
        Output.parse(Path(os.fsdecode(b"m\xff.onnx")))


@pytest.mark.parametrize("name", ["x" * 201, "ä" * 101 + ".onnx"])
def test_long_name(name):
    with pytest.raises(UserError, match="is longer than 200 bytes"):
        Output.parse(Path(name))


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Output.parse(Path("~/m.onnx")).path == tmp_path / "m.onnx"


@pytest.mark.parametrize("place", [".", "..", "inside/.."])
def test_where_the_user_stands_is_not_replaced(place, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=f"output '{place}' is the folder you are in"):
        check(checkpoint, place, overwrite=True)


def test_existing_triton_model(checkpoint, tmp_path):
    output = Output.parse(tmp_path / "ir-llama", "triton")

    def check_again(overwrite: bool = True) -> None:
        check_outputs([output], checkpoint, overwrite, lambda output: 1000)

    (tmp_path / "ir-llama" / "1").mkdir(parents=True)
    (tmp_path / "ir-llama" / "config.pbtxt").write_text("")
    check_again()
    with pytest.raises(UserError, match="exists"):
        check_again(overwrite=False)
    (tmp_path / "ir-llama" / "2").mkdir()  # another version, which is not ours to remove
    with pytest.raises(UserError, match="is not a Triton model of version 1 alone; it is not overwritten"):
        check_again()


def test_collisions(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"would both write .*config.json"):
        check(checkpoint, tmp_path / "a.onnx", tmp_path / "b.onnx")
    with pytest.raises(UserError, match="would both write"):
        check(checkpoint, tmp_path / "a.onnx", tmp_path / "a.onnx")
    check(checkpoint, tmp_path / "a.onnx", tmp_path / "a", tmp_path / "a.safetensors", tmp_path / "b" / "b.onnx")


@pytest.mark.parametrize("place", [".", "..", "inside", "inside.onnx"])
def test_base_model_is_out_of_bounds(place, checkpoint):
    with pytest.raises(UserError, match="lie in each other"):
        check(checkpoint, checkpoint.path / place, overwrite=True)


@pytest.mark.parametrize(
    "outs",
    [
        ("both", "both/m.onnx"),
        ("both/m.onnx", "both"),
        ("both", "both/deep/r.safetensors"),
        ("both.safetensors", "both.safetensors/folder"),
    ],
)
def test_no_output_lies_in_another(outs, checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"output '.*both.*/.*' lies in '.*both(.safetensors)?', another output"):
        check(checkpoint, *(tmp_path / out for out in outs), overwrite=True)


@pytest.mark.parametrize("name", ["m.onnx", "folder", "deep/r.safetensors"])
def test_below_a_file(name, checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"lies below .*notes.txt, which is a file"):
        check(checkpoint, tmp_path / "notes.txt" / name)


def test_mounted_folder_is_refused(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(UserError, match="is a disk of its own"):
        check_outputs([Output.parse(tmp_path / "volume")], checkpoint, True, lambda _: 0)
    check_outputs([Output.parse(tmp_path / "volume" / "model")], checkpoint, True, lambda _: 0)


def test_link_to_a_folder_stays(tmp_path):
    (tmp_path / "large-disk" / "out").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "large-disk" / "out")
    for content in ("first", "second"):
        Output.parse(link).write(lambda folder, content=content: (folder / "config.json").write_text(content) and None)
        assert link.is_symlink()
        assert (tmp_path / "large-disk" / "out" / "config.json").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large-disk", "out"]


def test_full_disk_is_said_before_starting(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"GB free; the outputs need about"):
        check(checkpoint, tmp_path / "new" / "deep" / "m.onnx", size=shutil.disk_usage(tmp_path).free)


def test_write_moves_everything_into_place(tmp_path):
    def fill(folder: Path) -> None:
        assert folder.parent == tmp_path
        assert not list(folder.iterdir())
        (folder / "m.onnx").write_text("graph")
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o600)  # as safetensors leaves its files

    (tmp_path / ".m.onnx.partial").mkdir()
    (tmp_path / ".m.onnx.partial" / "left over").write_text("")
    assert Output.parse(tmp_path / "m.onnx").write(fill) == 7
    assert sorted(os.listdir(tmp_path)) == ["config.json", "m.onnx"]
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_killed_while_moving_no_old_model_has_new_data(tmp_path, monkeypatch):
    output = Output.parse(tmp_path / "m.onnx")
    names = ("m.onnx", "m.onnx.data", "m.routing.safetensors")

    def fill(text: str, folder: Path) -> None:
        for name in names:
            (folder / name).write_text(text)

    output.write(partial(fill, "old"))
    replace, moved = Path.replace, []

    def killed_at(count: int, file: Path, target: Path) -> None:
        if len(moved) == count:
            raise KeyboardInterrupt
        moved.append(replace(file, target))

    for count in range(3):
        moved.clear()
        monkeypatch.setattr(Path, "replace", lambda file, target, count=count: killed_at(count, file, target))
        with pytest.raises(KeyboardInterrupt):
            output.write(partial(fill, "new"))
        assert not (tmp_path / "m.onnx").exists()
    monkeypatch.setattr(Path, "replace", replace)
    output.write(partial(fill, "new"))
    assert {(tmp_path / name).read_text() for name in names} == {"new"}


@pytest.mark.parametrize(("name", "target"), [("m.onnx", "hf"), ("folder", "hf"), ("folder", "triton")])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
)
def test_failure_leaves_the_old_and_no_half(name, target, error, tmp_path):
    output = Output.parse(tmp_path / name, target)
    output.write(lambda folder: (folder / "m.onnx").write_text("old") and None)

    def fill(folder: Path) -> None:
        (folder / "m.onnx").write_text("new")
        raise error

    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        output.write(fill)
    if not isinstance(error, KeyboardInterrupt):
        assert "No space left on device" in str(caught.value)
    assert [path.read_text() for path in tmp_path.rglob("m.onnx") if path.is_file()] == ["old"]
    assert os.listdir(tmp_path) == [name]

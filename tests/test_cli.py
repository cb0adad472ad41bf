"""The command line: what it prints, and one clear line with exit code 2 for everything a user can put right."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import random_routing
from trained import TINY

from ir_convert import report
from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.outputs import Output
from ir_convert.routing import Routing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}"], "Missing option '--out'"),
        (["--out", "{out}"], "Missing argument 'MODEL'"),
        (["convert", "{base}", "--out", "{out}"], "extra argument ({base}) Beside MODEL everything is an option"),
        (["{base}", "--out", "{out}", "--calibration", "a", "b"], "is repeated: --calibration A --calibration B"),
        (["{base}", "--out", "{out}.safetensor"], "is of no known kind"),
        (["{base}", "--out", "{out}", "--sparsity", "1"], r"sparsity 1 is not in [0, 1)"),
        (["{base}", "--out", "{out}", "--sparsity", "-0.1"], "sparsity -0.1 is not in [0, 1)"),
        (["{base}", "--out", "{out}", "--sparsity", "nan"], "sparsity nan is not in [0, 1)"),
        (["{base}", "--out", "{out}", "--sparsity", "much"], "'much' is not a valid float"),
        (["{base}", "--out", "{out}", "--tokens", "0"], "0 is not in the range x>=1"),
        (["{base}", "--out", "{out}", "--nonsense"], "No such option '--nonsense'"),
        (["{base}", "--out", "{out}", "--device", "toaster"], "device 'toaster' cannot be used here"),
        (["./absent", "--out", "{out}"], "model folder './absent' does not exist"),
        (["{base}", "--out", "{out}.gguf"], "is of no known kind"),
        (["{base}", "--out", "{out}", "--target", "toaster"], "'toaster' is not one of 'hf', 'triton'"),
        (["{base}", "--out", "{out}.onnx", "--target", "triton"], "--target triton wants a folder"),
        (["{base}", "--out", "{base}"], "lie in each other"),
        (["{base}", "--out", "{out}", "--calibration", "absent.txt"], "no tokenizer that loads"),
        (["{base}", "--out", "{out}", "--routing", "absent.safetensors"], "cannot read the routing file"),
        (["{trained}", "--out", "{out}", "--calibration", "absent.txt"], "calibration text absent.txt does not exist"),
        (["{trained}", "--out", "{out}", "--calibration", "{empty}"], "is empty"),
        (["{trained}", "--out", "{out}", "--sparsity", "0.95"], "sparsity 0.95 is out of reach for this model"),
        (["{trained}", "--out", "{out}", "--rank", "500"], "rank 500 is more than"),
        (["{base}", "--out", "{out}", "--device", "meta"], "device 'meta' cannot be used here"),
        (["{base}", "--out", "{out}", "--seed", "-1"], "-1 is not in the range"),
        (["{base}", "--out", "{out}", "--trace"], "--trace is of ONNX files, and no output is one"),
        (["{base}", "--out", "{out}", "--logits", "last"], "--logits last is of ONNX files"),
        (["{base}", "--out", "{out}.safetensors", "--dtype", "float16"], "--dtype float16 is of models"),
        (["{base}/config.json", "--out", "{out}"], "is a file: name the folder that it lies in"),
        (["{base}", "--out", "{out}", "--routing", "{base}"], "cannot read the routing file {base}: it is a folder"),
        (["generate", "{base}", "x", "--temperature", "nan"], "temperature nan is not in"),
        (["generate", "{base}", "x", "--seed", "-1"], "-1 is not in the range"),
        (["generate", "absent.onnx", "hello"], "artifact 'absent.onnx' does not exist"),
        (["generate", "{base}", "hello"], "not an informed-routing checkpoint"),
        (["generate", "{empty}", "hello"], "not written by ir-convert"),
        (["generate", "{base}", ""], "the prompt is empty"),
        (["~nobody-here/model", "--out", "{out}"], "~nobody-here/model leads nowhere"),
        (["{base}", "--out", "~nobody-here/out"], "~nobody-here/out leads nowhere"),
        (["{base}", "--out", "{out}", "--routing", "~nobody-here/r"], "~nobody-here/r leads nowhere"),
        (["generate", "~nobody-here/m.onnx", "x"], "~nobody-here/m.onnx leads nowhere"),
    ],
)
def test_one_clear_line_and_nothing_written(arguments, message, run, base, tmp_path):
    from trained import TINY

    empty = tmp_path / "empty.txt"
    empty.write_text("")
    places = {"base": base, "out": tmp_path / "out", "trained": TINY, "empty": empty}
    code, out, err = run(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert message.format(**places) in err
    assert err.startswith("ir-convert: ")
    assert err.count("\n") == 1
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_what_is_closed_to_the_user(run, base, tmp_path, monkeypatch):
    """As root may do all, what the system says is played."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
    code, _, err = run(base, "--out", tmp_path / "out")
    assert code == 2
    assert "safetensors may not be read: permission denied" in err
    routing = tmp_path / "r.safetensors"
    routing.write_bytes(b"closed")
    with pytest.raises(UserError, match=f"{routing} may not be read: permission denied"):
        Routing.load(routing)

    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    assert run("generate", "closed/m.onnx", "x") == (2, "", "ir-convert: closed/m.onnx: Permission denied\n")


def test_what_is_refused_as_out_of_reach_names_what_is_not(run, tmp_path):
    """The rounded figure is one that would do."""
    for rank in (8, 16, 24):
        options = ["--out", tmp_path / "out", "--rank", rank, "--calibration", tmp_path / "absent"]
        code, _, err = run(TINY, *options, "--sparsity", "0.95")
        assert code == 2
        most = re.search(r"saves ([\d.]+) of the FLOPs", err)
        assert most is not None, err
        assert "absent" in run(TINY, *options, "--sparsity", most[1])[2]


def test_existing_output(run, base, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    code, _, err = run(base, "--out", tmp_path / "m.onnx")
    assert code == 2
    assert "config.json exists" in err
    assert (tmp_path / "config.json").read_text() == "mine"


def test_routing_of_another_model(run, base, converted, tmp_path):
    code, _, err = run(base, "--out", tmp_path / "out", "--routing", converted.folder / "ir-tiny.safetensors")
    assert code == 2
    assert "was made for other weights" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "--sparsity" in out
    assert "ir-convert generate" in out
    code, out, _ = run("generate", "--help")
    assert "Usage: ir-convert generate [OPTIONS] ARTIFACT PROMPT" in out
    assert run("--version")[0] == 0


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "ir_convert", "./absent", "--out", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ir-convert: model folder './absent' does not exist")


@pytest.mark.parametrize("arguments", [["model", "--out", "x"], ["generate", "x.onnx", "The"]])
def test_a_wrong_sparsity_is_refused_before_torch_is_loaded(arguments):
    script = (
        "import sys\n"
        "from ir_convert import cli\n"
        f"sys.argv = ['ir-convert', *{arguments}, '--sparsity', '40']\n"
        "try:\n"
        "    cli.main()\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("ir-convert: sparsity 40 is not in [0, 1)")


def test_conversion_prints_its_table(converted):
    for words in ("perplexity", "FLOPs saved, asked", "25.0%", "ir-tiny.onnx", "MB", "time"):
        assert words in converted.output, converted.output


def test_a_routing_file_with_less_to_say(run, base, tmp_path):
    """Without figures none are shown; without what says whose it is, it is of no use."""
    routing, path = random_routing(Checkpoint.open(str(base))), tmp_path / "r.safetensors"
    assert not routing.measured
    routing.save(path)
    code, out, err = run(base, "--routing", path, "--out", tmp_path / "m.safetensors", "--sparsity", "0.2")
    assert (code, out.startswith("wrote")) == (0, True), err
    for name in ("base_model", "weights_sha256", "sparsity"):
        replace(routing, metadata={key: said for key, said in routing.metadata.items() if key != name}).save(path)
        code, _, err = run(base, "--routing", path, "--out", tmp_path / "n.safetensors")
        assert (code, err.count("\n")) == (2, 1)
        assert f"is damaged (its metadata has no {name}): calibrate again" in err


def test_triton(run, converted, tmp_path):
    """A model repository's layout; a .onnx output beside it stays what its name says."""
    folder = tmp_path / "model_repository" / "ir-tiny"
    command = [converted.checkpoint.path, "--routing", converted.folder / "ir-tiny.safetensors", "--target", "triton"]
    command += ["--trace"]
    outs = ["--out", folder, "--out", tmp_path / "beside.onnx"]
    code, _, err = run(*command, *outs)
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "1"}
    inside = {path.name.replace("model.", "beside.", 1) for path in (folder / "1").iterdir()}
    assert inside == {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert Routing.load(Output.parse(folder, "triton").routing_file).curve == converted.routing.curve
    assert json.loads((folder / "1" / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model.onnx"
    assert 'name: "executed", data_type: TYPE_BOOL' in (folder / "config.pbtxt").read_text()
    here, there = (run("generate", path, "def f(", "--max-new-tokens", 8)[1] for path in (folder, converted.onnx))
    assert here == there
    assert run(*command, *outs)[0] == 2
    assert run(*command, *outs, "--overwrite")[0] == 0


@pytest.mark.parametrize("artifact", ["onnx/ir-tiny.onnx", "ir-tiny", "onnx"])
def test_generate(artifact, run, converted, monkeypatch):
    code, out, err = run("generate", converted.folder / artifact, "def __init__(self", "--max-new-tokens", 12)
    assert code == 0, err
    assert out.startswith("def __init__(self")
    assert len(out) > 25
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def __init__(self\n")))
    assert run("generate", converted.folder / artifact, "-", "--max-new-tokens", 12)[1] == out
    sampled = [
        run("generate", converted.folder / artifact, "The", "--temperature", 1.0, "--seed", seed)[1]
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"num_beams": 2}, {"do_sample": True, "top_k": 3}])
def test_generate_is_greedy_whatever_the_base_model_samples_with(setting, run, converted, tmp_path):
    folder = tmp_path / "ir"
    shutil.copytree(converted.folder / "ir-tiny", folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | setting), "utf-8")
    command = ("def __init__(self", "--max-new-tokens", 12)
    code, out, err = run("generate", folder, *command)
    assert code == 0, err
    assert out == run("generate", converted.folder / "ir-tiny", *command)[1]


def test_the_cards_example_runs(converted, monkeypatch):
    folder = converted.folder / "ir-tiny"
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("2000", "20"), names)
    assert names["model"].config.sparsity == converted.routing.sparsity
    assert 0 < names["seen"].sparsity < 1


@pytest.mark.parametrize("artifact", ["ir-tiny", "onnx/ir-tiny.onnx"])
def test_a_reader_that_goes_away(artifact, converted):
    """As ``| head`` does: the process ends of itself, and says nothing."""
    command = [
        sys.executable,
        "-m",
        "ir_convert",
        "generate",
        converted.folder / artifact,
        "def f",
        "--max-new-tokens",
        "200",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_generate_from_bytes_that_are_no_text(run, converted):
    for artifact in ("ir-tiny", "onnx/ir-tiny.onnx"):
        code, _, err = run("generate", converted.folder / artifact, "def \udce4", "--max-new-tokens", 2)
        assert code == 0, err


def test_what_cannot_be_shown_is_written(run, converted, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "summary", full)
    out = tmp_path / "r.safetensors"
    code, shown, err = run(TINY, "--routing", converted.folder / "ir-tiny" / "routing.safetensors", "--out", out)
    assert code == 0
    assert shown.startswith(f"wrote {out}")
    assert "all is written, but cannot be shown: [Errno 28] No space left on device" in err
    assert out.exists()


def test_generate_out_of_reach(run, converted):
    for artifact in ("ir-tiny", "onnx/ir-tiny.onnx"):
        code, _, err = run("generate", converted.folder / artifact, "The", "--sparsity", "0.99")
        assert (code, err.count("\n")) == (2, 1)
        assert "0.99" in err

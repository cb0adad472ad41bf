"""An interrupted command goes on, a changed one is refused, a finished one is not repeated; several processes do as one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibrations import shorten
from jobs import OPTIONS, command, same, save_with_tokenizer

from ir_convert import convert as module
from ir_convert.calibrate import refit
from ir_convert.calibrate.endtoend import polish
from ir_convert.errors import UserError
from ir_convert.job import Job
from ir_convert.routing import Routing
from ir_convert.stream import work as stream_work
from ir_convert.writing import Writing


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("job") / "model")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fits in this process are as short as those in processes of their own."""
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "r.safetensors"
    done = subprocess.run(command(model, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_killed_and_resumed(model, unbroken, tmp_path):
    out = tmp_path / "r.safetensors"
    work = tmp_path / ".r.safetensors.work"
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work / "backward.1.safetensors").exists():
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    said = again.stderr.read()
    assert again.wait() == 0, said
    assert "Going on with the interrupted run" in said
    assert not work.exists()
    same(unbroken, out)


def test_changed_option_is_refused_by_name(model, tmp_path, run):
    out, work = tmp_path / "r.safetensors", tmp_path / ".r.safetensors.work"
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work / "forward.1.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = sorted(file.name for file in work.iterdir())
    code, _, err = run(model, *OPTIONS, "--rank", 5, "--out", out)
    assert code == 2
    assert "--rank was 4, is now 5" in err
    assert "--restart" in err
    assert err.count("\n") == 1
    assert sorted(file.name for file in work.iterdir()) == before
    code, _, err = run(model, *OPTIONS, "--tokens", 2560, "--out", out)
    assert code == 2
    assert "--tokens was 3072, is now 2560, --calibration text is not what it was: run its command again" in err
    code, _, err = run(model, *OPTIONS, "--rank", 5, "--out", out, "--restart")
    assert code == 0, err
    assert Routing.load(out).metadata["rank"] == 5


def test_a_run_keeps_others_away(model, unbroken, tmp_path, run):
    out = tmp_path / "r.safetensors"
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".r.safetensors.work" / "forward.1.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        learnt, elsewhere = ("--routing", unbroken), ("--out", tmp_path / "elsewhere.safetensors")
        for options in (OPTIONS, (*OPTIONS, "--restart"), (*OPTIONS, "--rank", 5), learnt, (*elsewhere, *learnt)):
            code, _, err = run(model, *options, "--out", out)
            assert code == 2
            assert f"another run is making {out}" in err
            assert err.count("\n") == 1
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert os.listdir(tmp_path) == [out.name]


def test_what_failed_at_once_is_in_nobodys_way(model, tmp_path, run):
    out = tmp_path / "r.safetensors"
    (tmp_path / ".r.safetensors.work").mkdir()
    (tmp_path / ".r.safetensors.work" / "job.json").write_text('{"model": "another"}')
    code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 0, err
    assert out.exists()


def of_a_gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("full", [of_a_gpu, lambda *_: torch.empty(1 << 50), lambda *_: np.empty(1 << 50)])
def test_goes_on_after_a_device_had_no_memory_left(full, model, tmp_path, run, monkeypatch):
    out = tmp_path / "r.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(refit, "train_activation", full)
        code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 2
    assert err.splitlines()[-1].startswith("ir-convert: cpu has no memory left. What was finished is kept")
    assert (tmp_path / ".r.safetensors.work" / "backward.3.safetensors").is_file()
    assert not out.exists()
    code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 0, err
    assert "Going on with the interrupted run" in err


def test_goes_on_after_a_disk_had_no_room(model, tmp_path, run, monkeypatch):
    def full(file, size):
        if "refit" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    out, work = tmp_path / "r.safetensors", tmp_path / ".r.safetensors.work"
    with monkeypatch.context() as patch:
        patch.setattr(stream_work, "reserve", full)
        code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 2
    last = err.splitlines()[-1]
    assert "No space left on device" in last
    assert f"kept in {work}" in last
    assert (work / "backward.0.safetensors").is_file()
    code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 0, err
    assert "Going on with the interrupted run" in err


def test_little_room_is_said_before(model, tmp_path, run, monkeypatch):
    monkeypatch.setattr(module, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, err = run(model, *OPTIONS, "--out", tmp_path / "r.safetensors")
    assert code == 0, err
    assert f"{tmp_path} has 0.0 MB free: that may be too little." in err


def test_blocks_longer_than_the_model_knows_are_said(model, tmp_path, run):
    for length, said in ((32, True), (64, False)):
        shutil.copytree(model, short := tmp_path / str(length))
        config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": length}
        (short / "config.json").write_text(json.dumps(config))
        code, _, err = run(short, *OPTIONS, "--out", tmp_path / f"{length}.safetensors")
        assert code == 0, err
        assert (
            f"knows {length} positions, blocks have 64: give --block-size {length}." in err.replace("\n", " ")
        ) == said


def test_gradient_checkpointing_may_be_added_on_the_way(model, tmp_path, run, monkeypatch):
    out, options = tmp_path / "r.safetensors", [*OPTIONS, "--polish", 1]
    with monkeypatch.context() as patch:
        patch.setattr(polish, "train_routed", of_a_gpu)
        code, _, err = run(model, *options, "--out", out)
    assert code == 2
    assert "--gradient-checkpointing takes less" in err.splitlines()[-1]
    code, _, err = run(model, *options, "--gradient-checkpointing", "--out", out)
    assert code == 0, err
    assert "Going on with the interrupted run" in err
    code, _, err = run(model, *options, "--out", out)
    assert code == 0, err
    assert "Already done" in err


def test_configuration_is_part_of_the_job(model, tmp_path, run):
    base, out = tmp_path / "base", tmp_path / "r.safetensors"
    shutil.copytree(model, base)
    process = subprocess.Popen(command(base, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".r.safetensors.work" / "forward.1.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    original = (base / "config.json").read_text("utf-8")
    (base / "config.json").write_text(json.dumps(json.loads(original) | {"rope_theta": 500.0}), "utf-8")
    code, _, err = run(base, *OPTIONS, "--out", out)
    assert code == 2
    assert "config.json is not what it was" in err
    (base / "config.json").write_text(original, "utf-8")
    assert run(base, *OPTIONS, "--out", out)[0] == 0
    assert "Already done" in run(base, *OPTIONS, "--out", out)[2]
    for name, change in (("config.json", {"rope_theta": 500.0}), ("generation_config.json", {"eos_token_id": 7})):
        before = (base / name).read_text("utf-8")
        (base / name).write_text(json.dumps(json.loads(before) | change), "utf-8")
        code, _, err = run(base, *OPTIONS, "--out", out)
        assert code == 2, name
        assert "exists" in err
        (base / name).write_text(before, "utf-8")


def test_finished_is_not_repeated(model, unbroken, run):
    before = unbroken.stat().st_mtime_ns
    code, out, err = run(model, *OPTIONS, "--out", unbroken)
    assert (code, out) == (0, "")
    assert "Already done" in err
    assert unbroken.stat().st_mtime_ns == before
    code, _, err = run(model, *OPTIONS, "--rank", 3, "--out", unbroken)
    assert code == 2
    assert "exists" in err


def test_what_lost_a_file_is_not_done(model, run, tmp_path):
    outs = [word for name in ("m.onnx", "hf") for word in ("--out", tmp_path / name)]
    assert run(model, *OPTIONS, *outs)[0] == 0
    hf = ("config.json", "modeling_ir.py", "tokenizer.json", "model.safetensors")
    for lost in ("m.onnx.data", "genai_config.json", *(f"hf/{name}" for name in hf)):
        assert "Already done" in run(model, *OPTIONS, *outs)[2]
        (tmp_path / lost).rename(tmp_path / "elsewhere")
        code, _, err = run(model, *OPTIONS, *outs)
        assert code == 2
        assert "exists: name another output, or give --overwrite" in err
        (tmp_path / "elsewhere").rename(tmp_path / lost)
    (tmp_path / lost).unlink()
    more = ["--out", tmp_path / "r.safetensors"]
    code, _, err = run(model, *OPTIONS, *outs, *more, "--overwrite")
    assert code == 0, err
    assert f"The calibration is that of {tmp_path / 'm.onnx'}" in err
    assert "Calibration will take" not in err
    assert (tmp_path / lost).is_file()
    same(tmp_path / "m.routing.safetensors", tmp_path / "r.safetensors")
    assert "Already done" in run(model, *OPTIONS, *outs, *more)[2]
    code, _, err = run(model, *OPTIONS, *outs, *more, "--out", tmp_path / "hf" / "m.onnx")
    assert (code, "lies in" in err) == (2, True)  # what is done already is in the way as well


def test_what_was_killed_when_all_was_written_leaves_nothing(model, tmp_path, run, monkeypatch):
    out, work = tmp_path / "r.safetensors", tmp_path / ".r.safetensors.work"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "clear", lambda *_: None)
        assert run(model, *OPTIONS, "--out", out)[0] == 0
    held = (work / "job.json").read_text("utf-8")
    (work / "job.json").write_text(held.replace('"--rank": 4', '"--rank": 5'), "utf-8")
    assert "Already done" in run(model, *OPTIONS, "--out", out)[2]
    assert work.exists()  # another job waits there
    (work / "job.json").write_text(held, "utf-8")
    assert "Already done" in run(model, *OPTIONS, "--out", out)[2]
    assert not list(tmp_path.glob(".*"))


def test_options_that_do_nothing_are_refused(model, tmp_path, run):
    for options, said in (
        (("--steps", 3), "--steps 3 is of the paper and greedy recipes"),
        (("--recipe", "greedy", "--rank", 3), "--rank 3 is of forecasters"),
    ):
        code, _, err = run(model, "--out", tmp_path / "r.safetensors", *options)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_a_finished_calibration_is_written_another_way(model, tmp_path, run, monkeypatch):
    """What decides how files are written may change after the calibration: writing may have failed for it."""
    out, write = tmp_path / "m.onnx", Writing.write

    def refuse(*_):
        raise UserError("it does not fit float16")

    monkeypatch.setattr(Writing, "write", refuse)
    assert run(model, *OPTIONS, "--out", out, "--dtype", "float16", "--trace")[0] == 2
    monkeypatch.setattr(Writing, "write", write)
    code, _, err = run(model, *OPTIONS, "--out", out, "--logits", "last")
    assert code == 0, err
    assert "calibration was finished before" in err
    assert "Calibration will take" not in err
    assert "Already done" in run(model, *OPTIONS, "--out", out, "--logits", "last")[2]
    assert "exists" in run(model, *OPTIONS, "--out", out)[2]
    assert not list(tmp_path.glob(".*"))


def test_estimate_is_printed_first(model, tmp_path, run):
    code, _, err = run(model, *OPTIONS, "--out", tmp_path / "r.safetensors", "--units", "mlp")
    assert code == 0, err
    assert err.index("Calibration will take about") < err.index("forward")
    assert {unit for _, unit in Routing.load(tmp_path / "r.safetensors").units} == {"mlp"}


def test_sources_with_weights(model, tmp_path, run):
    words = "the quick brown fox jumps over the lazy dog and runs away from here to there again "
    (tmp_path / "a.txt").write_text("\n".join(f"{index} {words}" for index in range(400)))
    records = [json.dumps({"body": f"{index}: {words[::-1]}"}) for index in range(400)]
    (tmp_path / "b.jsonl").write_text("\n".join(records))
    sources = ["--calibration", f"{tmp_path}/a.txt=3", "--calibration", tmp_path / "b.jsonl"]
    code, _, err = run(model, *OPTIONS, *sources, "--out", tmp_path / "r.safetensors")
    assert code == 2
    assert "body" in err
    code, _, err = run(model, *OPTIONS, *sources, "--text-field", "body", "--out", tmp_path / "r.safetensors")
    assert code == 0, err
    metadata = Routing.load(tmp_path / "r.safetensors").metadata
    assert [source["tokens"] for source in metadata["calibration_mixture"]] == [2304, 768]
    assert len(metadata["test"]["sources"]) == 2


def test_two_processes_give_the_same_routing(model, unbroken, tmp_path):
    out = tmp_path / "r.safetensors"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = subprocess.run(command(model, out, launcher=torchrun), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = Routing.load(unbroken), Routing.load(out)
    h = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert one.units.keys() == two.units.keys()
    for key in one.units:
        assert one.units[key].forecaster.rank == two.units[key].forecaster.rank
        torch.testing.assert_close(one.units[key].forecaster(h), two.units[key].forecaster(h), rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(one.units[key].router(h), two.units[key].router(h), rtol=1e-2, atol=1e-2)
    assert two.metadata["test"]["perplexity"] == pytest.approx(one.metadata["test"]["perplexity"], rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]

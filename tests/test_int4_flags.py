"""The int4 flags: what goes together, what a job remembers of them, and what reaches the exporter."""

import shutil

import pytest
from calibrations import shorten
from jobs import OPTIONS, save_with_tokenizer
from models import save_random

from ir_convert.calibrate import local
from ir_convert.convert import convert
from ir_convert.export import onnx
from ir_convert.export.onnx.int4 import Int4
from ir_convert.routing import Routing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_with_tokenizer(tmp_path_factory.mktemp("int4") / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int4", "--out", "{out}"], "--int4 is of ONNX files, and no output is one"),
        (["--int4", "--out", "{out}.safetensors"], "give --calibrate-quantised in its place to calibrate for one"),
        (["--int4-method", "hqq", "--out", "{out}.onnx"], "--int4-method hqq quantises nothing by itself"),
        (["--int4", "--int4-method", "awq", "--out", "{out}.onnx"], "'awq' is not one of 'rtn', 'rtn_asym'"),
        (["--calibrate-quantised", "--out", "{out}.onnx"], "is for int4 units, and those of"),
        (["--calibrate-quantised", "--out", "{out}.safetensors", "--out", "{out}"], "give --int4 for an .onnx output"),
        (
            ["--calibrate-quantised", "--out", "{out}.safetensors", "--routing", "r.safetensors"],
            "whose place --routing takes",
        ),
    ],
)
def test_one_clear_line_and_nothing_written(arguments, message, run, base, tmp_path):
    code, out, err = run(base, *(argument.format(out=tmp_path / "out") for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def interrupted(*_):
    raise KeyboardInterrupt


def test_changed_method_is_refused_by_name(model, tmp_path, run, monkeypatch):
    shorten(monkeypatch)
    out, work = tmp_path / "r.safetensors", tmp_path / ".r.safetensors.work"
    with monkeypatch.context() as patch:
        patch.setattr(local, "run_backward", interrupted)
        code, _, err = run(model, *OPTIONS, "--calibrate-quantised", "--out", out)
        assert code == 130
        assert "interrupted; the same command goes on where it stopped" in err
        err = run(model, *OPTIONS, "--calibrate-quantised", "--out", out, "--restart")[2]
        assert "interrupted; the same command without --restart goes on where it stopped" in err
    assert (work / "forward.1.safetensors").is_file()
    code, _, err = run(model, *OPTIONS, "--calibrate-quantised", "--int4-method", "k_quant", "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--int4-method was rtn, is now k_quant:" in err
    code, _, err = run(model, *OPTIONS, "--out", out)
    assert code == 2
    assert "--int4-method was rtn, is now None, --calibrate-quantised was True, is now False" in err
    # The same command, the default spelt out, goes on, with weights that are kept.
    assert list((work / "int4").glob("model.layers.0.*.safetensors"))
    code, _, err = run(model, *OPTIONS, "--calibrate-quantised", "--int4-method", "rtn", "--out", out)
    assert code == 0, err
    assert "Going on with the interrupted run" in err
    assert Routing.load(out).quantised_units == Int4().facts()
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory):
    """A routing file that was calibrated on units that k_quant quantised."""
    path = tmp_path_factory.mktemp("calibrated") / "r.safetensors"
    options = {"tokens": 3072, "block_size": 64, "rank": 4, "router_width": 4, "sparsity": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        convert(str(model), [path], **options, calibrate_quantised=True, int4_method="k_quant")
    return path


@pytest.fixture
def exported(monkeypatch):
    """What reaches the ONNX exporter, in place of a file."""
    settings = []

    def write(checkpoint, routing, folder, name, dtype, on_progress, int4, trace, logits):
        assert checkpoint.rounding is None  # or weights would be quantised twice
        settings.append(int4)
        (folder / name).touch()
        routing.save(folder / f"{name.removesuffix('.onnx')}.routing.safetensors")

    monkeypatch.setattr(onnx, "write", write)
    return settings


@pytest.mark.parametrize(
    ("flags", "setting", "remark"),
    [
        (["--int4"], Int4("k_quant"), None),
        (
            ["--int4", "--int4-method", "rtn"],
            Int4("rtn"),
            "gets int4 units (rtn), and the routing was calibrated on int4",
        ),
        ([], None, "gets unquantised units, and the routing was calibrated on int4 units (k_quant)"),
    ],
)
def test_routing_file_says_how_to_quantise(flags, setting, remark, model, calibrated, exported, run, tmp_path):
    code, _, err = run(model, "--routing", calibrated, "--out", tmp_path / "m.onnx", *flags)
    assert code == 0, err
    assert exported == [setting]
    assert (remark or "routing was calibrated on") in err if remark else "was calibrated on" not in err


def test_calibrating_for_what_is_written(model, exported, run, tmp_path, monkeypatch):
    """All in one command; a naive calibration is remarked upon, one on quantised units is not."""
    shorten(monkeypatch)
    for flags, remarked in ((["--int4"], True), (["--int4", "--calibrate-quantised"], False)):
        out = tmp_path / str(remarked) / "m.onnx"
        code, _, err = run(model, *OPTIONS, *flags, "--out", out)
        assert code == 0, err
        assert ("--calibrate-quantised calibrates on what is written" in err) == remarked
        routing = Routing.load(out.with_name("m.routing.safetensors"))
        assert routing.quantised_units == (None if remarked else Int4().facts())
    assert exported == [Int4(), Int4()]


def test_bfloat16_is_for_gpus(model, calibrated, exported, run, tmp_path):
    code, _, err = run(model, "--routing", calibrated, "--dtype", "bfloat16", "--out", tmp_path / "m.onnx")
    assert code == 0, err
    assert "ONNX Runtime runs bfloat16 models on GPUs alone" in err
    triton = ("--target", "triton", "--out", tmp_path / "triton")
    code, _, err = run(model, "--routing", calibrated, "--dtype", "bfloat16", *triton)
    assert (code, err.count("\n")) == (2, 1)
    assert "Triton's ONNX Runtime backend takes no bfloat16" in err


def test_what_onnx_cannot_be_given_is_said_before_the_calibration(model, run, tmp_path):
    save_random("qwen3_moe", tmp_path / "moe")
    code, _, err = run(
        tmp_path / "moe", "--calibrate-quantised", "--int4-method", "hqq", "--out", tmp_path / "r.safetensors"
    )
    assert code == 2
    assert "--int4-method hqq is not for a mixture of experts" in err.splitlines()[-1]
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "generation_config.json").write_text("[1]")
    code, _, err = run(tmp_path / "damaged", *OPTIONS, "--out", tmp_path / "m.onnx")
    assert code == 2
    assert "generation_config.json is damaged" in err.splitlines()[-1]
    assert "Calibration will take" not in err

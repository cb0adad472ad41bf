"""A routing file in place of a calibration: what it serves, and what it refuses."""

import json
import shutil

from trained import TINY

from ir_convert.checkpoint import Checkpoint
from ir_convert.routing import Routing


def test_routing_file_tells_where_it_comes_from(converted):
    metadata = converted.routing.metadata
    checkpoint = Checkpoint.open(str(converted.checkpoint.path))
    assert metadata["weights_sha256"] == checkpoint.weights_sha256
    assert metadata["recipe"] == "local"
    assert metadata["seed"] == 0
    assert len(metadata["calibration_sha256"]) == 64
    assert metadata["sparsity"] == 0.25
    assert abs(metadata["test"]["sparsity"] - 0.25) < 0.02
    assert len(metadata["per_unit"]) == 16
    small = (converted.folder / "ir-tiny.safetensors").stat().st_size
    assert small < 0.12 * checkpoint.weight_bytes * 2  # fp32 routing of a model of this width


def test_one_calibration_serves_every_target(run, converted, tmp_path):
    """An earlier routing file, another sparsity: no calibration, the same units, the dial moved."""
    code, out, err = run(
        *(converted.checkpoint.path, "--routing", converted.folder / "ir-tiny.safetensors", "--sparsity", "0.5"),
        *("--out", tmp_path / "again.onnx", "--out", tmp_path / "r.safetensors", "--out", tmp_path / "hf"),
    )
    assert code == 0, err
    again = Routing.load(tmp_path / "r.safetensors")
    assert again.sparsity == 0.5
    assert "job_sha256" not in again.metadata  # the calibration's command would find nothing left to do
    assert again.threshold == again.metadata["threshold"] == converted.routing.curve.at(0.5)
    assert (tmp_path / "again.onnx.data").is_file()
    # What was measured at the setting before says so.
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "set to 25.0%" in out
    assert "set to 50.0% now, which has not been measured" in out
    assert "Asked for: 50.0%" in card
    assert "| on held-out text, set to 25.0% | dense | routed |" in card
    assert str(converted.checkpoint.path.parent) not in out + card + json.dumps(again.metadata)


def test_a_configuration_that_has_changed_since(run, converted, tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    config, out = json.loads((base / "config.json").read_text()), tmp_path / "r.safetensors"
    (base / "config.json").write_text(json.dumps(config | {"use_cache": False, "transformers_version": "4.0"}))
    command = [base, "--routing", converted.folder / "ir-tiny.safetensors", "--out", out, "--overwrite"]
    code, _, err = run(*command)
    assert (code, err.count("config.json")) == (0, 0), err
    theta = config["rope_parameters"] | {"rope_theta": 5e5}
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1, "rope_parameters": theta}))
    code, _, err = run(*command)
    assert code == 0, err
    said = " ".join(err.split())
    assert "rms_norm_eps was 1e-06, is 0.1; rope.rope_theta was 10000.0, is 500000.0. Calibrate again" in said


def test_what_routing_takes_the_place_of_is_refused(run, converted, tmp_path):
    command = [
        converted.checkpoint.path,
        "--routing",
        converted.folder / "ir-tiny.safetensors",
        "--out",
        tmp_path / "o",
    ]
    for options, named in (
        (["--kv-cache", "strict", "--polish", 50], "--kv-cache, --polish"),
        (["--calibration", "x.txt", "--lora"], "--calibration, --lora"),
        (["--units", "mlp", "--tokens", 99], "--tokens, --units"),
        (["--restart"], "--restart: of a calibration"),
        (["--sparsity", -0.5], "sparsity -0.5 is not in"),
    ):
        code, _, err = run(*command, *options)
        assert code == 2
        assert named in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())

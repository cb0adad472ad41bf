"""The speed tables' machinery on a tiny model: decisions are what was asked, ideals what a hand counts, rows what is printed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from ir_convert.export.onnx.ops.library import VARIABLE
from ir_convert.units import Forecaster, RoutedUnit, Router

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
POINTS = ["--prefill", "64", "--decode", "24", "--sparsities", "0,0.4", "--rounds", "2", "--steps", "16"]


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def counted():
    """(configuration, units) of one layer that is small enough to count by hand.

    Weights: q 64, k 32, v 32, o 64, MLP 3 * 128 = 384; head 80. Forecaster 2 * 8 * 2 = 32, router (8 + 1) * 3 = 27, twice.
    """
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    forecaster = Forecaster(torch.zeros(2, 8), torch.zeros(2), torch.zeros(8, 2), torch.zeros(8))
    router = Router(torch.zeros(3, 8), torch.zeros(3), torch.zeros(1, 3), torch.zeros(1))
    return config, {(0, unit): RoutedUnit(forecaster, router) for unit in ("attention", "mlp")}


def test_prefill_ideal_is_what_a_hand_counts(counted):
    from speed_ideal import prefill_ideal, sparsity

    flags = {(0, "attention"): np.array([[True, False, True]]), (0, "mlp"): np.array([[False, True, False]])}
    # A query at place p sees p + 1 keys: 2 * 2 products of width 4 in each of 2 heads, 32 FLOPs a key.
    dense = 3 * 2 * 576 + 32 * (1 + 2 + 3) + 3 * 2 * 80
    routed = 3 * 2 * 64 + 2 * 2 * 128 + 32 * (1 + 3) + 1 * 2 * 384 + 3 * 2 * 80 + 3 * 2 * 2 * (32 + 27)
    assert prefill_ideal(*counted, flags) == pytest.approx(routed / dense)
    assert sparsity(*counted, [flags]) == pytest.approx((128 / 3 + 384 * 2 / 3 - 2 * 59) / 576)
    head = 2 * 2 * 80  # of two tokens
    assert prefill_ideal(*counted, flags, logits="last") == pytest.approx((routed - head) / (dense - head))
    everything = {key: np.ones((1, 3), bool) for key in flags}
    assert prefill_ideal(*counted, everything) == pytest.approx(1 + 3 * 2 * 2 * 59 / dense)


def test_prefill_ideal_with_a_cache(counted):
    from speed_ideal import prefill_ideal

    flags = {(0, "attention"): np.array([[False]]), (0, "mlp"): np.array([[True]])}
    dense = 2 * 576 + 32 * 6 + 2 * 80
    assert prefill_ideal(*counted, flags, past=5) == pytest.approx((dense - 2 * 128 - 32 * 6 + 4 * 59) / dense)


@pytest.mark.parametrize(
    ("precision", "weight", "head", "router"), [("fp32", 4, 4, 4), ("fp16", 2, 2, 4), ("int4", 0.625, 1.125, 0.625)]
)
def test_decode_reads_what_any_of_the_batch_executes(counted, precision, weight, head, router):
    from speed_ideal import decode_ideal

    one = {(0, "attention"): np.array([[True], [False]]), (0, "mlp"): np.array([[False], [False]])}
    none = {key: np.zeros((2, 1), bool) for key in one}
    always = 80 * head + 2 * (32 * weight + 27 * router)
    read = (weight * 192 + weight * 64) / 2  # without the MLP; without q and o as well
    dense = weight * 576 + 80 * head
    assert decode_ideal(*counted, [one, none], precision) == pytest.approx((read + always) / dense)


def test_threshold_is_found_or_refused():
    from speed_measure import CLOSE, FAR, seek

    tried = []

    def saved(threshold: float) -> float:  # much steeper, and elsewhere, than the search expects
        tried.append(threshold)
        return 0.9 / (1 + math.exp(-8 * (threshold - 1.5))) - 0.03

    for wanted in (0.1, 0.4, 0.8):
        assert abs(saved(seek(saved, wanted, 0.0, 0.87, 0.03)) - wanted) <= CLOSE
    assert len(tried) <= 3 * 11
    with pytest.raises(RuntimeError, match="no threshold saves"):
        seek(lambda threshold: 0.4 + 2 * FAR * (1 if threshold > 0.1 else -1), 0.4, 0.0, 0.9)


def test_turns_are_taken_both_ways():
    from speed_measure import time_in_turn

    order: list[str] = []
    runners = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    times = time_in_turn(runners, 2)
    assert "".join(order) == "ababba"  # the first two warm up
    assert times == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_targets():
    from speed_measure import target

    row = {"asked": 0.4, "kind": "decode", "precision": "int4", "ideal": 0.6, "tokens": 1}
    assert target(row, 0.9) == (pytest.approx(1.5), 1.20)
    assert target(row | {"asked": 0.0}, 0.9) == (0.9, 1.03)
    assert target(row | {"kind": "prefill", "tokens": 512}, 0.9) == (pytest.approx(1.5), 1.05)
    assert target(row | {"kind": "prefill", "tokens": 511}, 0.9) is None


def test_native_kernels_beside_functions(capsys):
    from speed_measure import _native
    from speed_tables import print_point

    times = {"routed 0.4": [0.002, 0.002, 0.004], "native 0.4": [0.001, 0.002, 0.001], "own": [0.004, 0.004, 0.004]}
    saved = {"routed 0.4": 0.4, "native 0.4": 0.39}
    assert _native(times, saved, "0.3", "own") == {}
    native = _native(times, saved, "0.4", "own")
    assert _native(times | {"own_native": [0.002] * 3}, saved, "0.4", "own") == native | {"native_to_native_dense": 0.5}
    assert native == {
        "native_achieved": 0.39,
        "native_ms": 1.0,
        "native_ratio": 0.25,
        "native_to_functions": 0.5,
        "native_to_functions_quartiles": [0.375, 0.75],
    }
    row = {"asked": 0.4, "achieved": 0.4, "kind": "decode", "precision": "fp32", "cache": "in-place", "tokens": 1}
    row |= {"dense": "own", "dense_ms": {"own": 4.0}, "routed_ms": 2.0, "ratio": 0.5, "ratio_quartiles": [0.4, 0.6]}
    print_point("decode", [row | {"ideal": 0.5} | native])
    assert "native/functions" in (printed := capsys.readouterr().out)
    assert "|      1.00 |            0.500 | 0.375-0.750 |" in printed


def test_native_kernels_that_are_not_built(monkeypatch, tmp_path):
    import onnx_speed

    monkeypatch.setattr(onnx_speed, "find", lambda: None)
    with pytest.raises(SystemExit, match="no library of native kernels has been built"):
        onnx_speed.main(["--models", "tiny", "--precisions", "fp32", "--threads", "1", *POINTS, "--native"])


def check_records(result: dict, overhead: float) -> None:
    """Every point has its rows, each of which saved what was asked and names the ideal of just that."""
    points = {(row["kind"], row["batch"]) for row in result["records"]}
    assert points == {("prefill", 1), ("decode", 1), ("decode", 4)}
    assert len(result["records"]) == 2 * len(points)
    for row in result["records"]:
        assert row["routed_ms"] > 0
        assert row["dense_ms"][row["dense"]] == min(row["dense_ms"].values()) > 0
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
        if row["asked"] == 0:
            assert row["achieved"] == pytest.approx(-overhead, abs=1e-6)
            assert row["ideal"] > 1
        else:
            assert row["achieved"] == pytest.approx(0.4, abs=0.03)
            assert row["ideal"] < 1
            assert 0 < row["approximated_most"] - row["approximated_least"] < 1  # no unit always or never


def test_one_round_on_the_cpu(tmp_path, capsys):
    import onnx_speed

    out = tmp_path / "results" / "speed.json"
    onnx_speed.main(
        ["--models", "tiny", "--precisions", "fp32", "--threads", "1", *POINTS, "--json", str(out), "--profile"]
    )
    result = json.loads(out.read_text())
    check_records(result, result["config"]["models"]["tiny"]["overhead"])
    assert all(set(row["dense_ms"]) == {"own"} for row in result["records"]) == bool(result["config"]["notes"])
    printed = capsys.readouterr().out
    assert "| saved, asked |" in printed
    assert "Profile of decode, 24 cached, batch 4" in printed
    onnx_speed.main(["--print", str(out)])
    table = next(line for line in printed.splitlines() if line.startswith("|         0.40 |"))
    assert table in capsys.readouterr().out
    onnx_speed.main(["--print", str(out), str(out), "--short"])
    row = next(row for row in result["records"] if row["kind"] == "decode" and row["asked"] == 0.4)
    short = capsys.readouterr().out
    assert short.count("\n| decode, 24 cached, 4 texts, float32 |") == 1
    assert f" {row['ratio']:.2f} ({row['ideal']:.2f}) |" in short


def test_unknown_precision(capsys):
    import onnx_speed

    with pytest.raises(SystemExit):
        onnx_speed.main(["--models", "tiny", "--precisions", "int4,fp8"])
    assert "--precisions fp8: give fp32, int4 or both" in capsys.readouterr().err


def test_the_gpu_script_on_the_cpu(tmp_path, capsys, monkeypatch, library):
    import gpu

    out = tmp_path / "gpu.json"
    monkeypatch.setenv(VARIABLE, str(library))
    gpu.main(["--device", "cpu", "--models", "tiny", *POINTS, "--batches", "1,4", "--json", str(out)])
    result = json.loads(out.read_text())
    check_records(result, result["config"]["models"]["tiny"]["overhead"])
    numerics = result["numerics"]
    assert 0 < numerics["routed_logits_off"] < gpu.LOGITS_TOLERANCE  # fp16 was really fp16
    assert numerics["routed_scores_off"] < numerics["margin"]
    assert 0 < numerics["native_routed_logits_off"] < gpu.LOGITS_TOLERANCE
    assert min(result["limits"].values()) > 0
    for row in result["records"]:
        assert row["native_ms"] > 0
        assert set(row["shares_of_limit"]) == {"dense", "routed", "native"}
        assert row["of_ideal_speedup"] == max(row["ideal"] / row["ratio"], row["ideal"] / row["native_ratio"])
    gpu.main(["--print", str(out)])
    printed = capsys.readouterr().out
    assert "| saved, asked |" in printed
    assert "Shares of the limit" in printed


def test_limits():
    from speed_limits import limit_ms
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 100
    limits = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    step = {"tokens": 1, "cached": 9, "batch": 3, "precision": "fp16", "ideal": 0.5, "attention": 0.25}
    cache = (
        2 * 2 * 32 * 3 * 10 * 2
    )  # keys and values of two layers, ten places in each of three sequences, 2 bytes each
    assert limit_ms(config, step, limits, dense=True) == pytest.approx((2 * weights + cache) / 1e6)
    assert limit_ms(config, step, limits, dense=False) == pytest.approx((weights + cache / 4) / 1e6)
    prompt = step | {"tokens": 2, "cached": 0, "batch": 1}
    core = 2 * 4 * 64 * (1 + 2)  # of two layers: each query against the keys that it sees
    assert limit_ms(config, prompt, limits, dense=True) == pytest.approx((2 * 2 * weights + core) / 1e6)


def test_the_gpu_script_notices_wrong_numbers(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "LOGITS_TOLERANCE", 1e-9)
    with pytest.raises(RuntimeError, match="logits are off"):
        gpu.verify(tmp_path, "cpu")

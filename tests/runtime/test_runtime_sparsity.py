"""The dial of a model in the ONNX runtime: set, held, and watched."""

import math

import numpy as np
import pytest
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.families import UNITS
from ir_convert.flops import Budget
from ir_convert.routing import Curve
from ir_convert.runtime import OnnxModel


def test_sparsity(base, model):
    assert model.threshold == pytest.approx(model.curve.at(0.4))
    model.set_sparsity(0)
    assert model.threshold == -math.inf
    with pytest.raises(UserError, match="out of reach"):
        model.set_sparsity(0.99)
    for sparsity in (-1, math.nan):
        with pytest.raises(UserError, match="not in"):
            model.set_sparsity(sparsity)
    assert OnnxModel.load(base[1] / "ir-tiny.onnx", sparsity=0.2).threshold == pytest.approx(model.curve.at(0.2))
    assert OnnxModel.load(base[1], threshold=1.5).threshold == 1.5
    assert model.eos_ids == {2}


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_holds_a_sparsity_that_the_curve_misses(tmp_path, kv_cache):
    """Random scores straddle 0, which saves about 0.4; this curve is off by 2. Half of each batch is padding."""
    (tmp_path / "base").mkdir()
    (tmp_path / "onnx").mkdir()
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    routing = random_routing(checkpoint, kv_cache=kv_cache)
    routing.curve = Curve([0.2, 0.4, 0.6], [-3.0, -2.0, -1.0])
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx")
    model, generator = OnnxModel.load(tmp_path / "onnx", threads=1), np.random.default_rng(0)
    model.threshold = 0.5
    mask = np.repeat([[0, 1]], 128, axis=1).repeat(2, axis=0)

    def run() -> float:
        model.logits(generator.integers(3, 131, (2, 256)), mask)
        return model.saved

    with model.hold_sparsity(0.4) as control:
        assert model.threshold == -2.0
        saved = [run() for _ in range(30)]
        assert model.threshold == control.threshold > -1.0
    assert saved[0] < 0.3
    assert abs(np.mean(saved[-10:]) - 0.4) < 0.02
    run()
    assert model.threshold == 0.5
    with pytest.raises(UserError, match="out of reach"), model.hold_sparsity(0.61):
        pass
    with pytest.raises(ValueError, match="gain 0 does not lead"), model.hold_sparsity(0.4, gain=0):
        pass

    with model.hold_sparsity(0.4) as control:
        model.set_sparsity(0)
        assert [run() <= 0 for _ in range(3)] == [True] * 3
        model.set_sparsity(0.2)
        saved = [run() for _ in range(20)]
        assert control.sparsity == 0.2
    assert abs(np.mean(saved[-8:]) - 0.2) < 0.03

    with model.hold_sparsity(0.4):
        model.threshold = -math.inf
        assert [run() <= 0 for _ in range(2)] == [True] * 2  # the caller's, and where it goes on from

    with model.hold_sparsity(0.4, gain=1.0):  # 256 real tokens in single steps move it once, and padding never does
        first = model.threshold
        for _ in range(255):
            model.logits(np.array([[5], [7]]), np.array([[1], [0]]))
        assert model.threshold == first
        model.logits(np.array([[5], [7]]), np.array([[1], [0]]))
        assert model.threshold == pytest.approx(first + 0.4 - model.saved)


def test_a_misspelt_setting_changes_nothing(model):
    before = model.threshold
    with pytest.raises(TypeError), model.hold_sparsity(0.2, gian=3):
        pass
    assert model.threshold == before


def test_trace(tmp_path):
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    routing = random_routing(checkpoint)
    del routing.units[1, "mlp"]
    (tmp_path / "onnx").mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx", trace=True)
    model = OnnxModel.load(tmp_path / "onnx", threads=1, threshold=0.0)
    mask = np.ones((2, 60), np.int64)
    mask[0, :4] = 0
    model.forward(np.random.default_rng(0).integers(3, 131, mask.shape), mask)
    assert model.executed is not None
    assert model.executed.shape == (3, 2, 2, 60)
    assert not model.executed[:, :, 0, :4].any()
    np.testing.assert_array_equal(model.executed[1, 1], mask.astype(bool))
    budget = Budget.of(checkpoint.config, routing.units)
    rates = {
        (layer, unit): 1 - float(model.executed[layer, UNITS.index(unit)].sum()) / mask.sum()
        for layer, unit in routing.units
    }
    assert model.saved == pytest.approx(budget.sparsity(rates), abs=1e-5)
    assert any(0.05 < rate < 0.95 for rate in rates.values())


def test_the_innermost_is_in_charge(model):
    ids = np.random.default_rng(0).integers(3, 131, (1, 300))
    with model.hold_sparsity(0.4) as outer:
        model.logits(ids)
        held = outer.threshold
        with model.hold_sparsity(0.2):
            model.logits(ids)
        assert model.threshold == outer.threshold == held
        model.logits(ids)
        assert model.threshold == outer.threshold != held


def test_a_call_of_padding_alone_moves_nothing(model):
    with model.hold_sparsity(0.4) as control:
        first = model.threshold
        model.logits(np.array([[5, 7]]), np.zeros((1, 2), int))
        assert np.isfinite(model.saved)
        model.logits(np.full((1, 256), 5))
        assert model.threshold == pytest.approx(first + control.gain * (0.4 - model.saved))


def test_cached_tokens_fill_no_window(model):
    """They have been in one."""
    with model.hold_sparsity(0.4) as control:
        first = control.threshold
        for _ in model.generate(np.full((1, 200), 5), max_new_tokens=40, eos_ids=()):
            assert model.threshold == first


def test_another_aim_begins_a_window(model):
    """What was saved on the way to the aim before is not held against it."""
    ids = np.random.default_rng(0).integers(3, 131, (1, 200))
    with model.hold_sparsity(0.4) as control:
        model.logits(ids)
        model.set_sparsity(0.2)
        first = control.threshold
        model.logits(ids[:, :100])
        assert control.threshold == first
        model.logits(ids[:, :156])
        assert control.threshold != first

"""The sparsity is held where it was asked for, on text that the calibration did not foresee."""

import math

import pytest
import torch
from models import random_routing, save_random
from routed_models import tokens

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write
from ir_convert.export.hf.control_ir import SparsityControl
from ir_convert.routing import Curve

# Random scores straddle 0, which saves about 0.4; this curve is off by 2.
OFF = Curve([0.2, 0.4, 0.6], [-3.0, -2.0, -1.0])


@pytest.fixture(scope="module", params=["full", "strict"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_random("llama", path)
    checkpoint = Checkpoint.open(str(path))
    routing = random_routing(checkpoint, kv_cache=request.param)
    routing.curve = OFF
    folder = tmp_path_factory.mktemp("ir")
    write(checkpoint, routing, folder)
    return load(folder).eval()


def run(model, block: torch.Tensor) -> float:
    """Returns what was saved."""
    with model.routing_statistics() as seen, torch.no_grad():
        model(block)
    return seen.sparsity


def test_a_curve_that_is_off(model):
    before = model.config.routing_threshold
    with model.hold_sparsity(0.4) as control:
        assert model.config.routing_threshold == -2.0
        saved = [run(model, tokens(1, 256, seed=seed)) for seed in range(30)]
        assert model.config.routing_threshold == control.threshold > -1.0
    assert saved[0] < 0.3
    assert abs(sum(saved[-10:]) / 10 - 0.4) < 0.02
    assert model.config.routing_threshold == before
    assert run(model, tokens(1, 256)) == saved[0]  # nothing moves it any more
    assert run(model, tokens(1, 256)) == saved[0]


def test_single_tokens_move_it_once_in_a_window(model):
    with model.hold_sparsity(0.4), torch.no_grad():
        ids, thresholds = tokens(1, 1), []
        for _ in range(256):
            thresholds.append(model.config.routing_threshold)
            model(ids)
        assert set(thresholds) == {-2.0}
        assert model.config.routing_threshold != -2.0


def test_dense_stays_dense(model):
    with model.hold_sparsity(0):
        for seed in range(3):
            assert run(model, tokens(1, 256, seed=seed)) == 0
            assert model.config.routing_threshold == "-inf"  # not a number, for JSON has no infinity


def test_out_of_reach(model):
    before = model.config.routing_threshold
    with pytest.raises(ValueError, match="out of reach"), model.hold_sparsity(0.61):
        pass
    assert model.config.routing_threshold == before


def test_law():
    """threshold += gain * (asked - saved), saved being the mean over the tokens of a window."""
    control = SparsityControl(0.5, 1.0, gain=4.0)
    assert control.observe(0.0, 100) == 1.0
    assert control.observe(0.9, 155) == 1.0
    assert control.observe(0.5, 1) == pytest.approx(1 + 4 * (0.5 - (0.9 * 155 + 0.5) / 256))
    start = control.threshold
    assert control.observe(0.75, 1000) == start - 1
    assert control.observe(0.25, 256) == start
    assert SparsityControl(0.0, -math.inf).observe(-0.1, 512) == -math.inf

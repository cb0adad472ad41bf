"""The budget is met on unseen text, and forecasting beats skipping."""

import math

import pytest
import torch
from trained import Converted

from ir_convert.calibrate import calibrate, read_blocks
from ir_convert.evaluate import Quality, evaluate
from ir_convert.flops import Budget
from ir_convert.progress import Silent


@pytest.fixture(scope="module")
def figures(converted: Converted) -> list[Quality]:
    """Dense, and sparsity 0.25 and 0.5, on unseen text."""
    thresholds = [converted.routing.curve.at(sparsity) for sparsity in (0.25, 0.5)]
    args = converted.decoder, converted.routing.units, converted.budget, converted.unseen, thresholds, Silent()
    return evaluate(*args)


def test_dense_perplexity_is_the_base_models(converted, figures):
    losses = [converted.base(input_ids=row[None], labels=row[None]).loss.item() for row in converted.unseen]
    assert figures[0].perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert figures[0].perplexity < 40  # really trained


@pytest.mark.parametrize(("index", "asked"), [(1, 0.25), (2, 0.5)])
def test_budget_is_met_on_unseen_text(index, asked, figures):
    assert figures[index].sparsity == pytest.approx(asked, abs=0.02)


def test_more_sparsity_costs_more(figures):
    assert figures[0].perplexity < figures[1].perplexity < figures[2].perplexity
    assert figures[0].agreement == 1 > figures[1].agreement > figures[2].agreement


def test_forecasting_beats_skipping(converted, figures):
    blocks = read_blocks(converted.folder / "calibration.txt", converted.tokenizer, 65536)
    greedy = calibrate(converted.checkpoint, blocks, sparsity=0.25, rank=0)
    budget = Budget.of(converted.checkpoint.config, 0, greedy.router_width)
    args = converted.decoder, greedy.units, budget, converted.unseen, [greedy.threshold], Silent()
    dense, skipping = evaluate(*args)
    excess = math.log(figures[1].perplexity / dense.perplexity)
    greedy_excess = math.log(skipping.perplexity / dense.perplexity)
    assert skipping.sparsity < figures[1].sparsity + 0.02  # no forecaster cost is counted against skipping
    assert excess < 0.7 * greedy_excess


def test_same_seed_same_routing(converted):
    """Two calibrations with the same options are equal bit for bit."""
    blocks = read_blocks(converted.folder / "calibration.txt", converted.tokenizer, 12_000)
    one, other = (calibrate(converted.checkpoint, blocks, sparsity=0.3, rank=4, seed=7) for _ in range(2))
    assert one.curve == other.curve
    for key, unit in one.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(tensor, other.units[key].tensors()[name]), (key, name)

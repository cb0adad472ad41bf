"""The budget is met on unseen text, and forecasting beats skipping."""

import math

import pytest
import torch
from calibrations import shorten
from trained import TOKENS, Converted

from ir_convert.calibrate import Options, calibrate
from ir_convert.calibrate.recipes import fit
from ir_convert.calibrate.threshold import Meter
from ir_convert.data import Blocks, Source, read_blocks
from ir_convert.data.blocks import BLOCK
from ir_convert.evaluate import Quality, measure
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work


@pytest.fixture(scope="module")
def figures(converted: Converted) -> list[Quality]:
    """Dense, and sparsity 0.25 and 0.5, on unseen text."""
    thresholds = [converted.routing.curve.at(sparsity) for sparsity in (0.25, 0.5)]
    measured = measure(converted.decoder, converted.routing.units, converted.unseen, thresholds)
    return [measured.quality(place) for place in range(3)]


def calibration(converted: Converted, tokens: int, block: int = BLOCK) -> Blocks:
    return read_blocks([Source(str(converted.folder / "calibration.txt"))], converted.tokenizer, tokens, block)


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
    # As calibrate() does, but for the rest of the curve.
    blocks = calibration(converted, TOKENS)
    options = Options(sparsity=0.25, rank=0).settled(converted.checkpoint.config)
    parts = Work(), Team(), Silent()
    greedy = fit(converted.checkpoint, blocks, options, torch.device("cpu"), *parts)
    meter = Meter(converted.decoder, blocks.threshold, options.kv_cache, *parts)
    threshold = meter.near(greedy.units, greedy.scores, options.sparsity, "after the refit")
    measured = measure(converted.decoder, greedy.units, converted.unseen, [threshold])
    dense, skipping = measured.quality(0), measured.quality(1)
    excess = math.log(figures[1].perplexity / dense.perplexity)
    greedy_excess = math.log(skipping.perplexity / dense.perplexity)
    assert skipping.sparsity < figures[1].sparsity + 0.02  # no forecaster cost is counted against skipping
    assert excess < 0.7 * greedy_excess


def test_same_seed_same_routing(converted, monkeypatch):
    """Two calibrations with the same options are equal bit for bit."""
    shorten(monkeypatch)
    blocks, options = calibration(converted, 3072, 128), Options(sparsity=0.3, rank=4, seed=7)
    one, other = (calibrate(converted.checkpoint, blocks, options) for _ in range(2))
    assert one.curve == other.curve
    for key, unit in one.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(tensor, other.units[key].tensors()[name]), (key, name)

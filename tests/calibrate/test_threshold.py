"""The curve is what was measured, and what it promises on its own blocks is so."""

import math

import pytest
import torch
from calibrations import random_blocks
from hypothesis import given
from hypothesis import strategies as st
from models import random_routing, save_random

from ir_convert.calibrate.threshold import Meter, _rising, score_quantiles
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.evaluate import measure, standard_error
from ir_convert.families import UNITS
from ir_convert.flops import Budget
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work, run_routed

VARIANTS = [("full", UNITS), ("strict", UNITS), ("full", ("mlp",)), ("strict", ("attention",))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random("qwen3", path)
    return Checkpoint.open(str(path))


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: f"{variant[0]}-{'-'.join(variant[1])}")
def metered(request, checkpoint):
    """(decoder, units, meter, curve, asked) for a random routing."""
    kv_cache, kinds = request.param
    decoder, ids = Decoder(checkpoint, torch.device("cpu")), random_blocks().threshold
    units = random_routing(checkpoint, units=kinds, kv_cache=kv_cache).units
    meter = Meter(decoder, ids, kv_cache, Work(), Team(), Silent())
    asked = 0.5 * Budget.of(checkpoint.config, units, kv_cache).reachable
    scores = dense_scores(decoder, units, ids)
    near = meter.near(units, scores, asked)
    return decoder, units, meter, meter.curve(units, scores, asked, (asked, near)), asked


@torch.no_grad()
def dense_scores(decoder, units, ids):
    x, scores = decoder.embed(ids), {}
    for index, layer in decoder.layers():
        for unit in UNITS:
            h = layer.norm(unit, x)
            if (index, unit) in units:
                scores[index, unit] = units[index, unit].router(h).flatten()
            x = x + layer.contribution(unit, x)
    return scores


def test_curve_rises_and_reaches_what_can_be_reached(metered):
    decoder, units, meter, curve, asked = metered
    assert all(low < high for low, high in zip(curve.sparsity, curve.sparsity[1:], strict=False))
    assert all(low < high for low, high in zip(curve.threshold, curve.threshold[1:], strict=False))
    assert len(curve.sparsity) >= 6
    budget = Budget.of(decoder.config, units, meter.kv_cache)
    assert curve.sparsity[-1] == pytest.approx(budget.reachable, abs=1e-6)
    assert curve.sparsity[0] < asked / 2


def test_every_point_is_achieved_on_the_same_blocks(metered):
    decoder, units, meter, curve, _ = metered
    measured = measure(decoder, units, meter.ids, curve.threshold, meter.kv_cache)
    for place, saved in enumerate(curve.sparsity):
        quality = measured.quality(1 + place)
        assert quality.sparsity == pytest.approx(saved, abs=1e-6)
        assert quality.sparsity_error == pytest.approx(meter.errors[curve.threshold[place]], abs=1e-6)


def test_asked_is_met_between_points(metered):
    """As closely as these few tokens allow: a step of the curve is at least one token."""
    decoder, units, meter, curve, asked = metered
    achieved = measure(decoder, units, meter.ids, [curve.at(asked)], meter.kv_cache).quality(1).sparsity
    assert achieved == pytest.approx(asked, abs=0.02)
    assert min(abs(saved - asked) for saved in curve.sparsity) < 0.03  # it looked most closely there


def test_asked_is_met_near_the_top(metered):
    decoder, units, meter, curve, _ = metered
    for below in (0.02, 0.01):
        asked = Budget.of(decoder.config, units, meter.kv_cache).reachable - below
        achieved = measure(decoder, units, meter.ids, [curve.at(asked)], meter.kv_cache).quality(1).sparsity
        assert achieved == pytest.approx(asked, abs=0.007)


def test_standard_errors(metered):
    _, _, meter, curve, _ = metered
    errors = [meter.errors[threshold] for threshold in curve.threshold]
    assert all(0 < error < 0.2 for error in errors[1:-1])
    assert errors[-1] < 1e-6  # everything is approximated in every block


def test_share_of_tokens_is_counted_against_a_plain_forward_pass(metered):
    decoder, units, meter, curve, asked = metered
    threshold = curve.at(asked)
    _, rates = run_routed(decoder, units, meter.ids, [math.inf, threshold, -math.inf], meter.kv_cache)
    assert set(rates) == set(units)
    for key, rate in rates.items():
        assert rate.shape == (3, len(meter.ids))
        assert (rate[0] == 1).all(), key
        assert (rate[2] == 0).all(), key
    first = min(units, key=lambda key: (key[0], UNITS.index(key[1])))  # nothing before it is approximated
    scores = dense_scores(decoder, units, meter.ids)[first].view(meter.ids.shape)
    torch.testing.assert_close(rates[first][1], (scores <= threshold).float().mean(1))


def test_measurements_of_an_earlier_run_are_taken_over(checkpoint, tmp_path):
    decoder, ids = Decoder(checkpoint, torch.device("cpu")), random_blocks().threshold
    units = random_routing(checkpoint).units
    scores = dense_scores(decoder, units, ids)

    def run(folder):
        meter = Meter(decoder, ids, "full", Work(folder), Team(), Silent())
        near = meter.near(units, scores, 0.3)
        return near, meter.curve(units, scores, 0.3, (0.3, near)), meter.errors

    assert run(tmp_path) == run(tmp_path) == run(None)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_what_does_not_save_more_is_dropped(sparsity):
    thresholds = [float(place) for place in range(len(sparsity))]
    curve = _rising(thresholds, sparsity)
    assert curve.sparsity == sorted(set(curve.sparsity))
    assert curve.threshold == sorted(set(curve.threshold))
    assert curve.sparsity[0] == sparsity[0]
    assert curve.sparsity[-1] == max(sparsity)
    points = dict(zip(thresholds, sparsity, strict=True))
    assert all(points[threshold] == saved for threshold, saved in zip(curve.threshold, curve.sparsity, strict=True))


def test_quantiles_span_the_scores():
    scores = torch.randn(50, 20)
    quantiles = score_quantiles(scores)
    assert quantiles[0] == scores.min()
    assert quantiles[-1] == scores.max()
    assert quantiles.equal(quantiles.sort().values)
    assert float(quantiles[len(quantiles) // 2]) == pytest.approx(float(scores.median()), abs=0.02)


def test_standard_error_is_of_the_mean():
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx((14 / 3) ** 0.5 / 2)
    assert standard_error(torch.tensor([1.0])) == math.inf


def test_where_routing_shifts_the_stream_far(checkpoint):
    """The dense scores do not tell where to look: it goes where the first measurements lead."""
    decoder, ids = Decoder(checkpoint, torch.device("cpu")), random_blocks().threshold
    units = random_routing(checkpoint).units
    meter = Meter(decoder, ids, "full", Work(), Team(), Silent())
    near = meter.near(units, {key: torch.linspace(-1.2, 0.2, 100) - 2.0 for key in units}, 0.4)
    assert measure(decoder, units, ids, [near]).quality(1).sparsity == pytest.approx(0.4, abs=0.03)

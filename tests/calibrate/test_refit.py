"""Forecasters are fitted again to what they meet under routing, the tokens they serve first."""

import pytest
import torch
from calibrations import random_blocks, shorten
from models import random_routing, save_random

from ir_convert.calibrate import Options, refit
from ir_convert.calibrate.forecaster import Moments
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.families import UNITS
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work

THRESHOLD = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random("qwen2", path)
    return Checkpoint.open(str(path))


@torch.no_grad()
def met(decoder, units, ids, kv_cache):
    """Yields (key, h, goal, execute) as the routed model with these units meets them, one layer after the other."""
    x = dense = decoder.embed(ids)
    for index, layer in decoder.layers():
        for unit in UNITS:
            h, routed = layer.norm(unit, x), units.get((index, unit))
            dense = dense + layer.contribution(unit, dense)
            if routed is None:
                x = x + layer.contribution(unit, x)
                continue
            execute = routed.router(h) > THRESHOLD
            y = layer.contribution(unit, x, execute if unit == "attention" and kv_cache == "strict" else None)
            drift = torch.where(execute[..., None], 0, dense - x - y)
            limit = refit.FURTHEST * y.square().sum(-1).mean().sqrt()
            far = drift.norm(dim=-1, keepdim=True).clamp(min=1e-9)
            yield (index, unit), h, y + drift / far * far.clamp(max=limit), execute
            x = x + torch.where(execute[..., None], y, routed.forecaster(h))


@pytest.mark.parametrize(
    ("kv_cache", "kinds", "furthest"),
    [("full", UNITS, 10.0), ("full", UNITS, 0.5), ("strict", UNITS, 10.0), ("full", ("mlp",), 10.0)],
)
def test_forecasters_fit_the_routed_stream(kv_cache, kinds, furthest, checkpoint, monkeypatch):
    shorten(monkeypatch)
    monkeypatch.setattr(refit, "FURTHEST", furthest)
    decoder, ids = Decoder(checkpoint, torch.device("cpu")), random_blocks().fit
    before = random_routing(checkpoint, units=kinds, kv_cache=kv_cache).units
    ranks = {key: 2 + key[0] for key in before}
    options = Options(units=kinds, kv_cache=kv_cache)

    def run(steps, shrink):
        monkeypatch.setattr(refit, "SHRINK", shrink)
        rest = (ranks, ids, len(ids), THRESHOLD, options, Work(), Team(), Silent())
        return refit.refit(decoder, before, *rest, activation_steps=steps)

    shrunk, after, shares, factors = run(0, refit.SHRINK), run(0, 0.0), [], []
    assert list(after) == list(before)
    for key, h, goal, execute in met(decoder, after, ids, kv_cache):
        assert after[key].forecaster.rank == ranks[key]
        for name, tensor in vars(before[key].router).items():
            assert torch.equal(tensor, getattr(after[key].router, name))
        moments = Moments(h.shape[-1], h.shape[-1], h.device)
        weight = torch.where(execute, refit.EXECUTED_WEIGHT, 1.0)
        moments.add(h, goal, weight)
        expected, _ = moments.fit(ranks[key])
        forecast = after[key].forecaster(h)
        assert (forecast - expected(h)).abs().max() < 1e-3 * goal.std(), key
        # Each is made smaller by 0.3 of what it leaves unexplained, which does not change what later ones meet.
        left = (weight * (goal - forecast).square().sum(-1)).sum() / (weight * goal.square().sum(-1)).sum()
        factors.append(1 - 0.3 * left)
        torch.testing.assert_close(shrunk[key].forecaster(h), factors[-1] * forecast, rtol=1e-3, atol=1e-5)
        shares.append(execute.float().mean())
    assert 0.1 < torch.stack(shares).mean() < 0.9  # routing does decide
    assert max(factors) - min(factors) > 0.01

    trained = run(20, 0.0)
    assert any(not torch.equal(trained[key].forecaster.down, after[key].forecaster.down) for key in after)

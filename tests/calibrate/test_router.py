"""Routers learn the logarithm of the expected cost."""

import math

import pytest
import torch

from ir_convert.calibrate.router import fit_router
from ir_convert.stream import Sample, Team


def sample(tokens: int, block: int = 20) -> Sample:
    return Team().sample(tokens // block, block, torch.device("cpu"))


def test_router_recovers_log_expected_cost():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(20_000, 16, generator=generator) * torch.linspace(0.1, 10, 16) + 3.0
    truth = 1e-4 * torch.exp(2 * torch.tanh((h[:, 3] - 3.0) / h[:, 3].std()))
    noise = torch.randn(20_000, generator=generator) ** 2  # mean 1: a single probe's squared gradient is as noisy
    router = fit_router(h, truth * noise, width=8, share=0.01, seed=0, sample=sample(20_000))
    with torch.no_grad():
        expected = torch.log(truth) - math.log(0.01)
        scores, apart = router(h), (expected - expected.mean()).abs().mean()
        assert apart > 1.0
        assert (scores - expected).abs().mean() < 0.5 * apart
        assert torch.corrcoef(torch.stack([scores, expected]))[0, 1] > 0.9  # what decides is the order


def test_width_0_scores_all_alike():
    h, cost = torch.randn(500, 8) + 2, torch.rand(500)
    router = fit_router(h, cost, 0, 0.1, seed=3, sample=sample(500))
    scores = router(h)
    assert router.width == 0
    assert (scores == scores[0]).all()
    assert float(scores[0]) == pytest.approx(math.log(cost.mean()) - math.log(0.1), abs=0.1)


def test_a_smaller_share_scores_higher():
    """What saves half as much must cost half as much to be approximated as readily."""
    h, cost = torch.randn(500, 8), torch.rand(500)
    whole, half = (fit_router(h, cost, 4, share, seed=3, sample=sample(500)) for share in (0.1, 0.05))
    torch.testing.assert_close(half(h) - whole(h), torch.full((500,), math.log(2)))


def test_same_seed_same_router():
    h, cost = torch.randn(500, 8), torch.rand(500)
    first, second, other = (fit_router(h, cost, 4, 0.1, seed=seed, sample=sample(500)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not torch.equal(first.hidden, other.hidden)


@pytest.mark.parametrize("width", [0, 4])
def test_zero_cost_gives_finite_scores(width):
    h = torch.randn(500, 8)
    router = fit_router(h, torch.zeros(500), width, 0.1, seed=0, sample=sample(500))
    assert router(h).isfinite().all()


def test_an_input_that_never_varies_does_no_harm():
    h, cost = torch.randn(500, 8), torch.rand(500)
    h[:, 2] = 7.0
    router = fit_router(h, cost, 4, 0.1, seed=0, sample=sample(500))
    assert router(h).isfinite().all()
    assert (router(h) - math.log(0.5 / 0.1)).abs().max() < 3

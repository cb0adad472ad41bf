"""Routers learn the logarithm of the expected cost."""

import math

import torch

from ir_convert.calibrate.router import fit_router


def test_router_recovers_log_expected_cost():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(20_000, 16, generator=generator) * torch.linspace(0.1, 10, 16) + 3.0
    truth = 1e-4 * torch.exp(2 * torch.tanh((h[:, 3] - 3.0) / h[:, 3].std()))
    noise = torch.randn(20_000, generator=generator) ** 2  # mean 1: a single label's squared gradient is as noisy
    router = fit_router(h, truth * noise, width=8, share=0.01, seed=0)
    with torch.no_grad():
        expected = torch.log(truth) - math.log(0.01)
        assert (expected - expected.mean()).abs().mean() > 1.0
        assert (router(h) - expected).abs().mean() < 0.3


def test_same_seed_same_router():
    h, cost = torch.randn(500, 8), torch.rand(500)
    first, second = (fit_router(h, cost, 4, 0.1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_zero_cost_gives_finite_scores():
    h = torch.randn(500, 8)
    router = fit_router(h, torch.zeros(500), 4, 0.1, seed=0)
    assert router(h).isfinite().all()

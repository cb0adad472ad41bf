"""The closed-form forecaster against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_convert.calibrate.forecaster import Moments


def tokens(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 1.0
    y = torch.tanh(h @ torch.randn(d, d, generator=generator) / d) + 0.1 * torch.randn(n, d, generator=generator) - 2.0
    return h, y


def fit(h: torch.Tensor, y: torch.Tensor, rank: int, weight: torch.Tensor | None = None):
    moments = Moments(h.shape[-1], h.device)
    for part in range(3):  # streamed, in uneven parts
        rows = slice(part * len(h) // 3, (part + 1) * len(h) // 3)
        moments.add(h[rows], y[rows], None if weight is None else weight[rows])
    return moments.fit(rank)


def error(forecaster, h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    squared = ((forecaster(h) - y) ** 2).sum(-1)
    return float(squared.mean() if weight is None else (squared * weight).sum() / weight.sum())


def test_full_rank_is_least_squares():
    h, y = tokens(400, 6, 0)
    forecaster, _ = fit(h, y, 6)
    ones = torch.cat([h, torch.ones(len(h), 1)], 1)
    best = ones @ torch.linalg.lstsq(ones, y).solution
    assert error(forecaster, h, y) == pytest.approx(float(((best - y) ** 2).sum(-1).mean()), rel=2e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_gradient_descent_beats_it(rank):
    h, y = tokens(500, 8, 1)
    forecaster, _ = fit(h, y, rank)
    mine = error(forecaster, h, y)
    parameters = [t.clone().requires_grad_() for t in (forecaster.down, forecaster.up, forecaster.bias)]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(500):
        loss = ((h @ parameters[0].T @ parameters[1].T + parameters[2] - y) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mine <= loss.item() * 1.02


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 8), seed=st.integers(0, 999))
def test_reported_residual_is_the_measured_one(rank, seed):
    h, y = tokens(300, 8, seed)
    forecaster, unexplained = fit(h, y, rank)
    if rank == 0:
        assert unexplained == 1.0
        assert not forecaster(h).any()
    else:
        variance = float(((y - y.mean(0)) ** 2).sum(-1).mean())
        assert unexplained == pytest.approx(error(forecaster, h, y) / variance, rel=1e-3, abs=1e-4)


def test_weights_count_tokens():
    h, y = tokens(300, 8, 3)
    weight = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0)).float()
    repeated = torch.arange(300).repeat_interleave(weight.long())
    by_weight, _ = fit(h, y, 4, weight)
    by_repetition, _ = fit(h[repeated], y[repeated], 4)
    torch.testing.assert_close(by_weight(h), by_repetition(h), rtol=1e-4, atol=1e-4)


def test_more_rank_explains_more():
    h, y = tokens(500, 8, 4)
    residuals = [fit(h, y, rank)[1] for rank in range(9)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[1] < 0.999

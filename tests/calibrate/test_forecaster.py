"""The closed-form forecaster against brute force, and the training of its activation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_convert.calibrate import forecaster as module
from ir_convert.calibrate.forecaster import Moments, train_activation, truncated
from ir_convert.stream import Team
from ir_convert.units import Forecaster

CPU = torch.device("cpu")


def tokens(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 1.0
    y = torch.tanh(h @ torch.randn(d, d, generator=generator) / d) + 0.1 * torch.randn(n, d, generator=generator) - 2.0
    return h, y


def moments(h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> Moments:
    result = Moments(h.shape[-1], y.shape[-1], h.device)
    for part in range(3):  # streamed, in uneven parts
        rows = slice(part * len(h) // 3, (part + 1) * len(h) // 3)
        result.add(h[rows], y[rows], None if weight is None else weight[rows])
    return result


def fit(h: torch.Tensor, y: torch.Tensor, rank: int, weight: torch.Tensor | None = None):
    return moments(h, y, weight).fit(rank)


def error(forecaster, h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    squared = ((forecaster(h) - y) ** 2).sum(-1)
    return float(squared.mean() if weight is None else (squared * weight).sum() / weight.sum())


def spread(y: torch.Tensor) -> float:
    return float(((y - y.mean(0)) ** 2).sum(-1).mean())


def linear(h: torch.Tensor, y: torch.Tensor, rank: int) -> torch.Tensor:
    """The forecasts of the reduced-rank regression itself, without an activation: by SVD of the fitted outputs."""
    mean_h, mean_y = h.double().mean(0), y.double().mean(0)
    w, _, _ = moments(h, y).solve()
    fitted = (h.double() - mean_h) @ w
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] + mean_y


def test_full_rank_is_least_squares():
    h, y = tokens(400, 6, 0)
    forecaster, _ = fit(h, y, 6)
    ones = torch.cat([h, torch.ones(len(h), 1)], 1)
    best = ones @ torch.linalg.lstsq(ones, y).solution
    assert error(forecaster, h, y) == pytest.approx(float(((best - y) ** 2).sum(-1).mean()), rel=2e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_linear_map_of_its_rank_beats_it(rank):
    h, y = tokens(500, 8, 1)
    forecaster, _ = fit(h, y, rank)
    mine = error(forecaster, h, y)
    slope = 1.1
    start = (
        forecaster.down.clone(),
        forecaster.up.clone() * slope,
        y.mean(0) - h.mean(0) @ forecaster.down.T @ forecaster.up.T,
    )
    parameters = [t.requires_grad_() for t in start]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(500):
        loss = ((h @ parameters[0].T @ parameters[1].T + parameters[2] - y) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mine <= loss.item() * 1.02


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 8), seed=st.integers(0, 999))
def test_the_activation_starts_straight(rank, seed):
    """As good as if it had no activation: silu bends the code by little where it starts (0.8 % at worst, for outliers)."""
    h, y = tokens(300, 8, seed)
    forecaster, _ = fit(h, y, rank)
    straight = linear(h, y, rank).float()
    assert (forecaster(h) - straight).norm() < 1e-2 * (straight - straight.mean(0)).norm()


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 8), seed=st.integers(0, 999))
def test_reported_residuals_are_the_measured_ones(rank, seed):
    h, y = tokens(300, 8, seed)
    forecaster, unexplained = fit(h, y, rank)
    assert unexplained.shape == (rank + 1,)
    assert forecaster.rank == rank
    for r in range(rank + 1):
        measured = error(truncated(forecaster, r), h, y) / spread(y)
        assert float(unexplained[r]) == pytest.approx(measured, rel=1e-2, abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 8), seed=st.integers(0, 999))
def test_truncated_is_the_fit_of_that_rank(rank, seed):
    h, y = tokens(300, 8, seed)
    largest, unexplained = fit(h, y, 8)
    cut, direct = truncated(largest, rank), fit(h, y, rank)
    assert cut.rank == rank
    assert (cut(h) - direct[0](h)).abs().max() < 1e-3 * spread(y) ** 0.5
    torch.testing.assert_close(unexplained[: rank + 1], direct[1], rtol=1e-4, atol=1e-6)


def test_rank_0_forecasts_the_mean():
    h, y = tokens(300, 8, 2)
    forecaster, unexplained = fit(h, y, 0)
    assert unexplained.tolist() == [1.0]
    torch.testing.assert_close(forecaster(h), y.mean(0).expand_as(y))
    assert train_activation(forecaster, h, y, torch.ones(300), 20, 0, Team().sample(30, 10, CPU)) is forecaster


def test_weights_count_tokens():
    h, y = tokens(300, 8, 3)
    weight = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0)).float()
    repeated = torch.arange(300).repeat_interleave(weight.long())
    (by_weight, left), (by_repetition, left_too) = fit(h, y, 4, weight), fit(h[repeated], y[repeated], 4)
    torch.testing.assert_close(by_weight(h), by_repetition(h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left, left_too, rtol=1e-4, atol=1e-6)
    assert (by_weight(h) - fit(h, y, 4)[0](h)).abs().max() > 1e-2


def test_more_rank_explains_more():
    h, y = tokens(500, 8, 4)
    _, unexplained = fit(h, y, 8)
    assert unexplained.tolist() == sorted(unexplained.tolist(), reverse=True)
    assert unexplained[0] == 1
    assert unexplained[1] < 0.999


@pytest.mark.parametrize("dead", ["input", "output", "both"])
def test_what_never_varies_is_forecast(dead):
    h, y = tokens(200, 8, 5)
    if dead != "output":
        h = h.clone()
        h[:, 3:] = 2.0
    if dead != "input":
        y = torch.full_like(y, -1.5)
    forecaster, _ = fit(h, y, 6)
    assert all(tensor.isfinite().all() for tensor in vars(forecaster).values())
    assert error(forecaster, h, y) <= spread(y) * 1.01 + 1e-6
    assert error(forecaster, h + 0.1 * torch.randn_like(h), y) <= spread(y) * 2 + 1e-3


# The activation


def nonlinear(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs with no linear part to speak of: bumps and steps along a few directions."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(6000, 12, generator=generator)
    code = h @ torch.randn(12, 3, generator=generator) / 12**0.5
    y = torch.cat([torch.relu(2 * code), (2 * code).abs()], 1) @ torch.randn(6, 12, generator=generator)
    return h, y + 0.05 * torch.randn(6000, 12, generator=generator)


def train(h, y, rank: int, steps: int, weight: torch.Tensor | None = None) -> tuple[Forecaster, Forecaster]:
    weight = torch.ones(len(h)) if weight is None else weight
    start, _ = fit(h, y, rank, weight)
    sample = Team().sample(len(h) // 10, 10, CPU)
    return start, train_activation(start, h, y, weight, steps, 0, sample)


@pytest.fixture
def short(monkeypatch):
    """Steps and strides that these small problems converge in, whatever large ones are given."""
    monkeypatch.setattr(module, "BATCH", 1024)
    monkeypatch.setattr(module, "LR", 3e-2)


def test_training_beats_the_start_on_nonlinear_outputs(short):
    h, y = nonlinear(0)
    start, trained = train(h[:4000], y[:4000], 6, 300)
    assert trained.rank == start.rank
    assert error(trained, h[4000:], y[4000:]) < 0.5 * error(start, h[4000:], y[4000:])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 4])
def test_training_does_no_harm_where_there_is_nothing_to_gain(short, seed, rank):
    """On held-out tokens of outputs that are linear up to noise."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    y = h @ torch.randn(8, 8, generator=generator) + 2 * torch.randn(4000, 8, generator=generator)
    start, trained = train(h[:3000], y[:3000], rank, 300)
    assert error(trained, h[3000:], y[3000:]) < 1.04 * error(start, h[3000:], y[3000:])


def test_training_serves_the_tokens_that_weigh(short):
    """Two kinds of tokens, one code: it goes to the kind that counts."""
    h, y = nonlinear(1)
    kind = h[:, 0] > 0
    y = torch.where(kind[:, None], y, y.roll(1, 1))
    (_, one), (_, other) = (train(h, y, 2, 150, torch.where(kind == chosen, 1.0, 0.02)) for chosen in (True, False))
    assert error(one, h[kind], y[kind]) < 0.9 * error(other, h[kind], y[kind])
    assert error(other, h[~kind], y[~kind]) < 0.9 * error(one, h[~kind], y[~kind])


def test_no_steps_no_change():
    h, y = tokens(300, 8, 6)
    start, trained = train(h, y, 3, 0)
    assert trained is start


def test_same_seed_same_training(short):
    h, y = nonlinear(2)
    first, second = (train(h[:1000], y[:1000], 3, 20)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_a_unit_that_adds_nothing():
    """Block expansion zeroes units' last projections: the forecast is zero then, its code constant but for rounding."""
    h, _ = tokens(400, 16, seed=0)
    zero = torch.zeros_like(h)
    forecaster, _ = fit(h, zero, rank=4)
    assert float(forecaster(h).abs().max()) < 1e-6
    for constant in (torch.full_like(h, 0.1), torch.full_like(h, 1e3)):
        w, _, _ = moments(constant, zero).solve(ridge=1e-5)
        assert w.isfinite().all()


def test_eigenvectors_of_a_wide_matrix(monkeypatch):
    """Beyond ``EXACT`` by iteration: the same directions, largest first."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    matrix = basis * 0.95 ** torch.arange(200) @ basis.T
    monkeypatch.setattr(module, "EXACT", 10)
    found = module.leading_eigenvectors(matrix, 5)
    torch.testing.assert_close((basis[:, :5] * found).sum(0).abs(), torch.ones(5, dtype=torch.float64))

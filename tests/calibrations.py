"""Short calibrations of small random models, and what two of them must have in common."""

import math

import pytest
import torch

from ir_convert.calibrate import forecaster, refit, router
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Blocks
from ir_convert.routing import Routing
from ir_convert.units import Units

# Of the metadata: what tells how the run went, not what it gave.
OF_THE_RUN = ("fit_seconds", "calibration_seconds", "peak_memory_bytes")


def random_blocks(fit: int = 8, threshold: int = 5, test: int = 3, block: int = 24, seed: int = 0) -> Blocks:
    """Returns blocks of random tokens, from two sources."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randint(3, 131, (count, block), generator=generator)
        for name, count in (("fit", fit), ("threshold", threshold), ("test", test))
    }
    sources = {name: torch.arange(len(rows)) % 2 for name, rows in parts.items()}
    total = fit + threshold + test
    return Blocks(**parts, sources=sources, names=["even", "odd"], asked=[total - total // 2, total // 2])


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every fit short: for tests of what happens around them."""
    monkeypatch.setattr(router, "STEPS", 20)
    monkeypatch.setattr(router, "BATCH", 128)
    monkeypatch.setattr(forecaster, "BATCH", 128)
    monkeypatch.setattr(refit, "ACTIVATION_STEPS", 20)


def assert_same(one: Routing, other: Routing) -> None:
    """Asserts that two routings are equal bit for bit."""
    assert list(one.units) == list(other.units)
    for key, unit in one.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(tensor, other.units[key].tensors()[name]), (key, name)
    assert one.curve == other.curve
    assert what_it_gave(one) == what_it_gave(other)


def what_it_gave(routing: Routing) -> dict:
    """Returns the metadata, less what tells how the run went."""
    assert set(OF_THE_RUN) <= set(routing.metadata)
    return {name: value for name, value in routing.metadata.items() if name not in OF_THE_RUN}


def normalised(checkpoint: Checkpoint, tokens: int = 200, seed: int = 9) -> torch.Tensor:
    """Returns hidden states ``[tokens, hidden]`` such as a unit sees."""
    return torch.randn(tokens, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def furthest(one: Units, other: Units, h: torch.Tensor) -> tuple[float, float]:
    """Returns how far forecasts (relative) and scores (in nats) of two routings are apart on ``h[tokens, hidden]``, at most."""
    forecasts, scores = 0.0, 0.0
    for key, unit in one.items():
        forecast, again = (units[key].forecaster(h) for units in (one, other))
        spread = (forecast - forecast.mean(0)).norm() / math.sqrt(len(h))
        forecasts = max(forecasts, float((forecast - again).norm(dim=1).max() / spread.clamp(min=1e-9)))
        scores = max(scores, float((unit.router(h) - other[key].router(h)).abs().max()))
    return forecasts, scores

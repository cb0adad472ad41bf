"""FLOPs are counted against the modules that really run."""

import pytest
import torch

from ir_convert.families import UNITS, family_of
from ir_convert.flops import Budget


def linear_flops(module: torch.nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def test_budget_matches_the_modules(random_model):
    _, model, checkpoint, routing = random_model
    budget = Budget.of(checkpoint.config, routing.rank, routing.router_width)
    family, layer = family_of(checkpoint.config), model.model.layers[0]
    assert budget.dense == linear_flops(layer)
    for unit in UNITS:
        parts = family.unit(unit)
        module = getattr(layer, parts.module)
        assert budget.saved[unit] == sum(linear_flops(getattr(module, name)) for name in parts.skipped)
    unit_tensors = routing.units[0, "mlp"].tensors()
    matrices = [t for name, t in unit_tensors.items() if t.ndim == 2]
    assert budget.overhead == sum(2 * t.numel() for t in matrices)


def test_sparsity_of_none_and_all(random_model):
    _, _, checkpoint, routing = random_model
    budget = Budget.of(checkpoint.config, routing.rank, routing.router_width)
    none = dict.fromkeys(routing.units, 0.0)
    every = dict.fromkeys(routing.units, 1.0)
    assert budget.sparsity(none) == pytest.approx(-budget.overhead_share)
    assert budget.sparsity(every) == pytest.approx(budget.reachable)
    assert budget.decisions(none) == 0
    assert budget.decisions(every) == 1

"""FLOPs are counted against the modules that really run."""

import pytest
import torch

from ir_convert.families import UNITS, family_of
from ir_convert.flops import Budget


def linear_flops(module: torch.nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_budget_matches_the_modules(random_model, kv_cache):
    _, model, checkpoint, routing = random_model
    budget = Budget.of(checkpoint.config, routing.units, kv_cache)
    family, layer = family_of(checkpoint.config), model.model.layers[0]
    assert budget.dense == linear_flops(layer)
    for unit in UNITS:
        parts = family.unit(unit)
        module = getattr(layer, parts.module)
        saved = (
            linear_flops(module)
            if kv_cache == "strict"
            else sum(linear_flops(getattr(module, name)) for name in parts.skipped)
        )
        assert budget.saved[unit] == saved
    assert set(budget.overhead) == set(routing.units)
    for key, unit in routing.units.items():
        assert budget.overhead[key] == sum(2 * t.numel() for t in unit.tensors().values() if t.ndim == 2)
    shapes = {key: (unit.forecaster.rank, unit.router.width) for key, unit in routing.units.items()}
    assert Budget.of_shapes(checkpoint.config, shapes, kv_cache) == budget


def test_sparsity_of_none_and_all(random_model):
    _, _, checkpoint, routing = random_model
    budget = Budget.of(checkpoint.config, routing.units)
    none = dict.fromkeys(routing.units, 0.0)
    every = dict.fromkeys(routing.units, 1.0)
    assert budget.sparsity(none) == pytest.approx(-budget.overhead_share)
    assert budget.sparsity(every) == pytest.approx(budget.reachable)
    assert budget.decisions(none) == 0
    assert budget.decisions(every) == 1


def test_units_that_are_not_routed_save_nothing_and_cost_nothing(random_model):
    _, _, checkpoint, routing = random_model
    whole = Budget.of(checkpoint.config, routing.units)
    units = {key: unit for key, unit in routing.units.items() if key != (1, "attention")}
    part = Budget.of(checkpoint.config, units)
    every = dict.fromkeys(units, 1.0)
    gone = whole.share("attention") - whole.overhead[1, "attention"] / (whole.dense * whole.layers)
    assert part.reachable == pytest.approx(whole.reachable - gone)
    assert part.sparsity(every) == pytest.approx(part.reachable)
    assert part.decisions(every) == pytest.approx(5 / 6)
    dense = Budget.of(checkpoint.config, {})
    assert (dense.reachable, dense.sparsity({}), dense.decisions({})) == (0, 0, 0)

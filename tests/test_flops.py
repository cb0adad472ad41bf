"""FLOPs are counted against what really runs."""

import pytest
import torch
from products import watch

from ir_convert.families import UNITS, layer_parameters, packed_rows
from ir_convert.flops import Budget


def stored(checkpoint, unit, projection):
    """Returns the part of the first layer's stored weights that is a projection's."""
    tensor, rows = packed_rows(checkpoint.config, unit, projection)
    weight = checkpoint.read(f"model.layers.0.{checkpoint.family.unit(unit).module}.{tensor}.weight")
    return weight if rows is None else weight[rows]


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_budget_matches_what_runs(random_model, kv_cache):
    _, model, checkpoint, routing = random_model
    budget = Budget.of(checkpoint.config, routing.units, kv_cache)
    family, layers = checkpoint.family, model.model.layers
    ids = torch.arange(3, 21).view(2, 9)
    units = {(i, unit): getattr(layer, family.unit(unit).module) for i, layer in enumerate(layers) for unit in UNITS}
    with watch(model, units) as products:
        model.model(ids)
    for layer in range(len(layers)):
        ran = {unit: products.flops[layer, unit] / ids.numel() for unit in UNITS}
        assert budget.dense == sum(ran.values())
        assert budget.saved["mlp"] == ran["mlp"]
        kept = sum(2 * stored(checkpoint, "attention", name).numel() for name in family.attention.kept)
        assert budget.saved["attention"] == ran["attention"] - (0 if kv_cache == "strict" else kept)
    assert set(budget.overhead) == set(routing.units)
    for key, unit in routing.units.items():
        assert budget.overhead[key] == sum(2 * t.numel() for t in unit.tensors().values() if t.ndim == 2)
    shapes = {key: (unit.forecaster.rank, unit.router.width) for key, unit in routing.units.items()}
    assert Budget.of_shapes(checkpoint.config, shapes, kv_cache) == budget


def test_packed_rows_and_parameters(random_model):
    """Every row of a packed tensor is one projection's; the layer's matrices are all counted."""
    _, _, checkpoint, _ = random_model
    matrices = 0
    for unit in UNITS:
        places = checkpoint.family.unit(unit)
        for tensor, projections in places.packed.items():
            whole = checkpoint.read(f"model.layers.0.{places.module}.{tensor}.weight")
            assert torch.cat([stored(checkpoint, unit, name) for name in projections]).equal(whole)
    for tensor in checkpoint.read_layer(0).values():
        matrices += tensor.numel() if tensor.ndim > 1 else 0
    assert layer_parameters(checkpoint.config) == matrices


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

"""Ranks are spent where they buy most."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_convert.calibrate.allocate import allocate_ranks
from ir_convert.calibrate.dense import Learnt, candidate_ranks
from ir_convert.stream import Team
from ir_convert.units import Forecaster, Router

TOKENS = 6


def learnt(costs: torch.Tensor, scores: torch.Tensor) -> Learnt:
    """Only costs ``[candidates, tokens]`` and scores ``[tokens]`` matter here."""
    none = torch.zeros(0)
    return Learnt(Forecaster(none, none, none, none), Router(none, none, none, none), none, costs, scores)


@st.composite
def problems(draw):
    """(units, candidate ranks, mean rank): costs of any shape, also such as rise with rank."""
    mean = draw(st.integers(1, 12))
    ranks = candidate_ranks(mean, draw(st.integers(mean, 40)))
    count = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    units = {}
    for layer in range(count):
        costs = torch.rand(len(ranks), TOKENS, generator=generator) * 10 ** draw(st.integers(-2, 2))
        if draw(st.booleans()):
            costs = costs.sort(0, descending=True).values
        costs = costs[[ranks.index(rank) for rank in ranks]]  # small means have a rank twice
        units[layer, "mlp"] = learnt(costs, torch.randn(TOKENS, generator=generator))
    return units, ranks, mean


def cost(units, ranks, chosen, threshold: float = 0.0) -> float:
    """The loss on the tokens that are approximated."""
    return sum(
        float(unit.costs[ranks.index(chosen[key])][unit.scores <= threshold].double().sum())
        for key, unit in units.items()
    )


@settings(deadline=None)
@given(problems())
def test_within_budget_and_no_choice_is_cheaper(problem):
    units, ranks, mean = problem
    chosen = allocate_ranks(units, ranks, mean, 0.0, Team())
    assert list(chosen) == list(units)
    assert sum(chosen.values()) <= mean * len(units)
    every = (dict(zip(units, choice, strict=True)) for choice in product(ranks, repeat=len(units)))
    best = min(cost(units, ranks, choice) for choice in every if sum(choice.values()) <= mean * len(units))
    mine = cost(units, ranks, chosen)
    assert mine <= best * (1 + 1e-9) + 1e-12
    even = dict.fromkeys(units, min(mean, ranks[-1]))
    assert mine <= cost(units, ranks, even) * (1 + 1e-9) + 1e-12


@settings(deadline=None)
@given(problems(), st.integers(0, 30))
def test_more_budget_never_costs_more(problem, more):
    units, ranks, mean = problem
    less, enough = (allocate_ranks(units, ranks, budget, 0.0, Team()) for budget in (mean, mean + more))
    assert cost(units, ranks, enough) <= cost(units, ranks, less) * (1 + 1e-9) + 1e-12


def test_ranks_go_where_they_buy_something():
    scores = torch.zeros(TOKENS)
    falling = torch.tensor([8.0, 4.0, 2.0, 0.0])[:, None].expand(4, TOKENS)
    flat = torch.full((4, TOKENS), 5.0)
    units = {(0, "mlp"): learnt(flat, scores), (1, "mlp"): learnt(falling, scores), (2, "mlp"): learnt(flat, scores)}
    assert allocate_ranks(units, [2, 4, 8, 16], 8, 0.0, Team()) == {(0, "mlp"): 2, (1, "mlp"): 16, (2, "mlp"): 2}
    # None of the tokens that would gain is approximated: nothing to buy.
    units[1, "mlp"] = learnt(falling, scores + 1)
    assert set(allocate_ranks(units, [2, 4, 8, 16], 8, 0.0, Team()).values()) == {2}


def test_a_single_candidate():
    units = {(layer, "mlp"): learnt(torch.rand(1, TOKENS), torch.zeros(TOKENS)) for layer in range(3)}
    for rank in (0, 5):
        assert allocate_ranks(units, [rank], rank, 0.0, Team()) == dict.fromkeys(units, rank)
    assert candidate_ranks(0, 48) == [0]


def test_processes_add_up_their_costs():
    """Two processes whose tokens disagree choose what one process with all of them would."""
    generator = torch.Generator().manual_seed(3)
    ranks, keys = [2, 4, 8, 16], [(layer, "attention") for layer in range(3)]
    costs = {key: torch.rand(4, 2 * TOKENS, generator=generator).sort(0, descending=True).values for key in keys}
    scores = torch.zeros(TOKENS)
    whole = {key: learnt(value, torch.zeros(2 * TOKENS)) for key, value in costs.items()}
    halves = [{key: learnt(value[:, part::2], scores) for key, value in costs.items()} for part in range(2)]
    sums = [torch.stack([unit.costs.double().sum(1) for unit in half.values()]) for half in halves]
    team = Team()
    team.sum = lambda tensors: [sum(sums)]
    together = allocate_ranks(whole, ranks, 8, 0.0, Team())
    assert [allocate_ranks(half, ranks, 8, 0.0, team) for half in halves] == [together, together]

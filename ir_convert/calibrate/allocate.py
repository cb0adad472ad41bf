"""Ranks for all forecasters from one budget of FLOPs: more where it buys more, none to spare where it buys nothing."""

import numpy as np
import torch

from ..flops import Key
from ..stream import Team
from .dense import Learnt


def allocate_ranks(
    learnt: dict[Key, Learnt], ranks: list[int], mean: int, threshold: float, team: Team
) -> dict[Key, int]:
    """Chooses each unit's rank among ``ranks`` (rising) so that they average ``mean`` at most.

    What a rank costs is the estimated loss, in nats, on the tokens which the router would approximate at ``threshold``.
    The choice is the cheapest of all, by dynamic programming over the units; of equally cheap ones, lower ranks first.
    """
    keys = list(learnt)
    totals = torch.stack([(unit.costs * (unit.scores <= threshold)).double().sum(1).cpu() for unit in learnt.values()])
    costs = team.sum([totals])[0].numpy()
    budget = mean * len(keys)
    least = np.zeros(budget + 1)  # of the units so far, by the ranks they may spend
    chosen = np.zeros((len(keys), budget + 1), dtype=int)
    for unit, row in enumerate(costs):
        tried = np.full((len(ranks), budget + 1), np.inf)
        for place, rank in enumerate(ranks):
            if rank <= budget:
                tried[place, rank:] = least[: budget + 1 - rank] + row[place]
        chosen[unit], least = tried.argmin(0), tried.min(0)
    result = {}
    for unit in reversed(range(len(keys))):
        rank = ranks[chosen[unit, budget]]
        result[keys[unit]] = rank
        budget -= rank
    return {key: result[key] for key in keys}

"""Ranks for all forecasters from one budget of FLOPs: more where it buys more, none to spare where it buys nothing."""

import torch

from ..flops import Key
from .dense import Learnt
from ..stream import Team


def allocate_ranks(
    learnt: dict[Key, Learnt], ranks: list[int], mean: int, threshold: float, team: Team
) -> dict[Key, int]:
    """Chooses each unit's rank among ``ranks`` (rising) so that they average ``mean`` at most.

    What a rank buys is the estimated loss, in nats, that it saves on the tokens which the router would approximate at
    ``threshold``. Steps up are taken in the order of nats per rank, each unit's along the lower hull of its costs.
    """
    keys = list(learnt)
    if len(ranks) == 1:
        return dict.fromkeys(keys, ranks[0])
    totals = torch.stack([(unit.costs * (unit.scores <= threshold)).double().sum(1).cpu() for unit in learnt.values()])
    tokens = torch.tensor(
        [float(sum(unit.costs.shape[1] for unit in learnt.values()) / len(keys))], dtype=torch.float64
    )
    totals, tokens = team.sum([totals, tokens])
    costs = {key: (row / tokens).tolist() for key, row in zip(keys, totals, strict=True)}
    chosen = dict.fromkeys(keys, 0)
    left = mean * len(keys) - ranks[0] * len(keys)
    while True:
        best, gain = None, 0.0
        for key in keys:
            for place in range(chosen[key] + 1, len(ranks)):
                price = ranks[place] - ranks[chosen[key]]
                saved = (costs[key][chosen[key]] - costs[key][place]) / price if price else 0.0
                if price <= left and saved > gain:
                    best, gain = (key, place), saved
        if best is None:
            return {key: ranks[place] for key, place in chosen.items()}
        key, place = best
        left -= ranks[place] - ranks[chosen[key]]
        chosen[key] = place

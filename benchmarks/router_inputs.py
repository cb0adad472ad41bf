"""What routers could decide by: the estimated loss of approximating at a given budget, on tokens that routers were not fitted to.

    python benchmarks/router_inputs.py MODEL --calibration cal.txt [--sparsity 0.4]

Routers are fitted, as the local recipe fits them, on three quarters of the fit blocks, and choose on the fourth: all units'
tokens in one order of scores, until the asked share of FLOPs is saved, forecasters and routers paid for. ``code`` is the
forecaster's hidden layer, which is computed anyway. Costs are the recipe's own estimates on the dense stream; ``the cost
itself`` is what a router that knew them would lose: out of reach, for they are noisy.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ir_convert.calibrate import Options
from ir_convert.calibrate.dense import candidate_ranks, place_of_mean, run_backward, run_forward
from ir_convert.calibrate.forecaster import truncated
from ir_convert.calibrate.router import fit_router
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.decoder import Decoder
from ir_convert.families import UNITS
from ir_convert.flops import Budget, Key, forecaster_flops
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work
from ir_convert.units import Forecaster

See = Callable[[Tensor, Forecaster], Tensor]


def own(h: Tensor, _: Forecaster) -> Tensor:
    return h


def code(h: Tensor, forecaster: Forecaster) -> Tensor:
    return F.silu(F.linear(h, forecaster.down, forecaster.down_bias))


def with_norm(h: Tensor, forecaster: Forecaster) -> Tensor:
    return torch.cat([h, forecaster(h).norm(dim=-1, keepdim=True).log()], -1)


# What it is called, what it sees, and the multiple of the default width.
ROUTERS: tuple[tuple[str, See, float], ...] = (
    ("hidden state (default)", own, 1),
    ("hidden state, width x 1/4", own, 0.25),
    ("hidden state, width x 2", own, 2),
    ("hidden state and the forecast's norm", with_norm, 1),
    ("code", code, 1),
    ("code, width x 2", code, 2),
)


def hidden_states(decoder: Decoder, ids: Tensor) -> dict[Key, Tensor]:
    """Returns what every unit sees ``[tokens, d]``."""
    found: dict[Key, list[Tensor]] = {}
    x = list(decoder.embed(ids).split(16))
    for index, layer in decoder.layers():
        for unit in UNITS:
            found[index, unit] = [layer.norm(unit, part).flatten(0, 1) for part in x]
            x = [part + layer.contribution(unit, part) for part in x]
    return {key: torch.cat(parts) for key, parts in found.items()}


def lost(scores: dict[Key, Tensor], costs: dict[Key, Tensor], budget: Budget, overhead: float, asked: float) -> float:
    """Returns nats lost per token where the lowest scores are approximated until the asked share is saved; inf beyond reach."""
    order = torch.cat(list(scores.values())).argsort()
    shares = torch.cat([torch.full_like(score, budget.share(unit) / len(score)) for (_, unit), score in scores.items()])
    each = torch.cat([cost / len(cost) for cost in costs.values()])
    saved = shares[order].double().cumsum(0) - overhead
    return float(each[order][: int((saved < asked).sum())].sum()) if saved[-1] >= asked else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--sparsity", type=float, default=0.4)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    decoder, options = Decoder(checkpoint, torch.device("cpu")), Options().settled(checkpoint.config)
    ids = read_blocks([Source(args.calibration)], checkpoint.tokenizer, args.tokens).fit
    work, team, silent = Work(), Team(), Silent()
    states = run_forward(decoder, ids, work, silent)
    learnt = run_backward(decoder, ids, len(ids), states, options, work, team, silent)
    with torch.no_grad():
        h = hidden_states(decoder, ids)
    (rank, width), d = options.shape, checkpoint.config.hidden_size
    parts = len(ids) * 3 // 4 * ids.shape[1]
    place = place_of_mean(candidate_ranks(rank, d))
    costs = {key: unit.costs[place] for key, unit in learnt.items()}
    held_out = {key: cost[parts:] for key, cost in costs.items()}
    budget = Budget.of_shapes(checkpoint.config, dict.fromkeys(learnt, options.shape))
    forecasters = sum(forecaster_flops(d, rank) for _ in learnt) / (budget.dense * budget.layers)
    print(f"At {args.sparsity:.0%} saved; forecasters cost {forecasters:.2%} of the FLOPs\n")
    print("| the router sees | width | its cost | nats lost a token |\n|---|---|---|---|")
    for name, see, times in ROUTERS:
        mine = max(1, round(width * times))
        scores, inputs = {}, 0
        for key, unit in learnt.items():
            seen = see(h[key], truncated(unit.forecaster, rank))
            inputs = seen.shape[1]
            scores[key] = fitted_scores(seen, costs[key], parts, mine, budget.share(key[1]), ids.shape[1], team)
        routers = 2 * (inputs + 1) * mine * len(learnt) / (budget.dense * budget.layers)
        result = lost(scores, held_out, budget, forecasters + routers, args.sparsity)
        print(f"| {name} | {mine} | {routers:.2%} | {result:.4f} |", flush=True)
    true = {key: (cost.clamp(min=1e-30) / budget.share(key[1])).log() for key, cost in held_out.items()}
    chance = {key: torch.rand(len(cost), generator=torch.Generator().manual_seed(0)) for key, cost in held_out.items()}
    for name, scores in (("the cost itself", true), ("nothing: by chance", chance)):
        print(f"| {name} | | | {lost(scores, held_out, budget, forecasters, args.sparsity):.4f} |")


def fitted_scores(seen: Tensor, cost: Tensor, parts: int, width: int, share: float, block: int, team: Team) -> Tensor:
    """Fits a router on the first ``parts`` tokens and returns its scores of the others."""
    sample = team.sample(parts // block, block, seen.device)
    router = fit_router(seen[:parts], cost[:parts], width, share, 0, sample)
    with torch.no_grad():
        return router(seen[parts:])


if __name__ == "__main__":
    main()

"""The local recipe: two dense passes, a first threshold, and a refit under routing. No end-to-end training."""

from torch import Tensor

from ..decoder import Decoder
from ..flops import Budget
from ..progress import Reporter
from ..stream import Team, Work
from ..units import Units
from .allocate import allocate_ranks
from .dense import candidate_ranks, place_of_mean, run_backward, run_forward, units_at
from .fitted import Fitted
from .foreign import foreign
from .options import Options
from .refit import refit
from .threshold import Meter


def fit_local(
    decoder: Decoder, fit: Tensor, options: Options, meter: Meter, work: Work, team: Team, report: Reporter
) -> Fitted:
    """Fits forecasters and routers for ``options.sparsity``; each process of the team works on its share of the blocks.

    Args:
        fit: blocks of all processes ``[blocks, sequence]``, those that are ``foreign`` included.
    """
    mean, _ = options.shape
    ids, count = team.mine(fit), len(fit)
    text = ~foreign(count)
    ranks = candidate_ranks(mean, decoder.config.hidden_size)
    states = run_forward(decoder, ids, work, report)
    learnt = run_backward(decoder, ids, count, states, options, work, team, report)

    def of_text(values: Tensor) -> Tensor:
        return team.gather(values.view(len(ids), -1), count)[text].flatten()

    def overhead(routed: Units) -> float:
        return Budget.of(decoder.config, routed, options.kv_cache).overhead_share

    scores = {key: of_text(unit.scores) for key, unit in learnt.items()}

    even = units_at(learnt, dict.fromkeys(learnt, mean))
    threshold = meter.near(even, scores, options.sparsity)
    chosen = allocate_ranks(learnt, ranks, mean, threshold, team)
    units = refit(decoder, even, chosen, ids, count, threshold, options, work, team, report)
    place = place_of_mean(ranks)
    notes = {
        key: {
            "rank": chosen[key],
            "unexplained_variance": float(unit.unexplained[chosen[key]]),
            "cost_nats": float(of_text(unit.costs[place]).mean()),
        }
        for key, unit in learnt.items()
    }
    # Ranks that came out smaller than the mean cost less: at that threshold they save more.
    cheaper = overhead(even) - overhead(units)
    return Fitted(units, decoder, scores, (options.sparsity + cheaper, threshold), notes)

"""What routing costs in quality and saves in work, measured on token blocks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .decoder import Decoder
from .flops import Budget
from .progress import Reporter, Silent
from .stream import Approximated, Result, Team, Work, run_routed
from .units import Units

FIGURES = ("nll", "kl", "agree")


@dataclass(frozen=True)
class Quality:
    """Figures of one threshold on a set of blocks.

    Attributes:
        perplexity: per token of the model's tokenizer, within blocks.
        kl: mean Kullback-Leibler divergence from the dense model's next-token distribution, in nats.
        agreement: share of positions whose most likely next token is the dense model's.
        sparsity: share of FLOPs saved, forecaster and router cost subtracted; 0 for the dense model itself.
        sparsity_error: standard error of the former, from the spread over blocks.
        decisions: share of decisions that approximate.
        approximated: share of tokens approximated, by (layer, unit).
    """

    perplexity: float
    kl: float
    agreement: float
    sparsity: float
    sparsity_error: float
    decisions: float
    approximated: dict[tuple[int, str], float]


@dataclass(frozen=True)
class Measured:
    """Figures block by block, at each threshold; threshold 0 in order is the dense model.

    Attributes:
        nll: negative log-likelihood per token, in nats ``[thresholds, blocks]``.
        kl, agree: as in ``Quality``, ``[thresholds, blocks]``.
        approximated: share of tokens ``[thresholds, blocks]`` by (layer, unit).
    """

    nll: Tensor
    kl: Tensor
    agree: Tensor
    approximated: Approximated
    budget: Budget

    def quality(self, threshold: int, blocks: Tensor | None = None) -> Quality:
        """Returns the figures of one threshold, over all blocks or those of a mask ``[blocks]``."""
        every = torch.ones(self.nll.shape[1], dtype=torch.bool) if blocks is None else blocks
        by_unit = {key: rate[threshold, every].double() for key, rate in self.approximated.items()}
        rates = {key: float(rate.mean()) for key, rate in by_unit.items()}
        saved = sparsity_by_block(self.budget, by_unit) if by_unit else torch.zeros(1)
        return Quality(
            perplexity=math.exp(float(self.nll[threshold, every].mean())),
            kl=float(self.kl[threshold, every].mean()),
            agreement=float(self.agree[threshold, every].mean()),
            sparsity=self.budget.sparsity(rates) if threshold else 0.0,
            sparsity_error=standard_error(saved) if threshold else 0.0,
            decisions=self.budget.decisions(rates) if threshold else 0.0,
            approximated=rates,
        )


def sparsity_by_block(budget: Budget, approximated: dict[tuple[int, str], Tensor]) -> Tensor:
    """Returns the share of FLOPs saved ``[...]`` from the shares of tokens approximated, each ``[...]``."""
    return sum(budget.share(key[1]) * rate for key, rate in approximated.items()) - torch.tensor(budget.overhead_share)


def standard_error(values: Tensor) -> float:
    """Returns the standard error of the mean of ``values[n]``; infinite for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def measure(
    decoder: Decoder,
    units: Units,
    ids: Tensor,
    thresholds: Sequence[float],
    kv_cache: str = "full",
    report: Reporter | None = None,
    work: Work | None = None,
    team: Team | None = None,
    reference: Decoder | None = None,
) -> Measured:
    """Measures the dense model and the routed one at each threshold, in one pass over the layers.

    Args:
        reference: the dense model, where it has other weights than the routed one; its pass is one more.
        ids: token blocks ``[blocks, sequence]``, of which each process of the team measures its share.
        thresholds: execute where score > threshold.
    """
    work, team = work or Work(), team or Team()
    mine = team.mine(ids)

    def compute() -> Result:
        every = [-math.inf, *thresholds]
        x, approximated = run_routed(decoder, units, mine, every, kv_cache, report or Silent(), "evaluation", work)
        figures = torch.zeros(len(FIGURES), len(every), len(mine))
        dense = (
            None
            if reference is None
            else run_routed(reference, {}, mine, every[:1], kv_cache, report or Silent(), "dense", work)[0]
        )
        head = decoder.head()
        for block, tokens in enumerate(mine):
            streams = x[slice(block, block + 1)][0].to(decoder.device)
            if dense is not None:
                streams[0] = dense[slice(block, block + 1)][0, 0]
            figures[:, :, block] = _figures(decoder, head, streams, tokens)
        # x stays: a run that is killed before the figures are saved needs it again.
        rates = {f"{layer}.{unit}": rate for (layer, unit), rate in approximated.items()}
        return {"figures": figures} | rates

    result = work.once("evaluated", compute)
    figures = team.gather(result["figures"], len(ids), axis=2)
    rates = {(layer, unit): team.gather(result[f"{layer}.{unit}"], len(ids), axis=1) for layer, unit in units}
    nll, kl, agree = figures
    return Measured(nll, kl, agree, rates, Budget.of(decoder.config, units, kv_cache))


@torch.no_grad()
def _figures(decoder: Decoder, head: Callable[[Tensor], Tensor], x: Tensor, tokens: Tensor) -> Tensor:
    """Returns a block's figures ``[figures, thresholds]`` from the last layer's output ``[thresholds, sequence, hidden]``."""
    labels, found = tokens[1:].to(x.device), torch.empty(len(FIGURES), len(x), len(tokens) - 1)
    for part in decoder.for_logits(len(labels)):
        dense = None
        for index, stream in enumerate(x):
            p = F.log_softmax(head(stream[part]), dim=-1)
            dense = p if dense is None else dense
            nll = F.nll_loss(p, labels[part], reduction="none")
            kl = (dense.exp() * (dense - p)).sum(-1)
            agree = (p.argmax(-1) == dense.argmax(-1)).float()
            found[:, index, part] = torch.stack([nll, kl, agree]).cpu()
    return found.mean(-1)


def logits(decoder: Decoder, units: Units, ids: Tensor, threshold: float, kv_cache: str = "full") -> Tensor:
    """Returns the routed model's fp32 logits ``[blocks, sequence, vocabulary]`` for ``ids[blocks, sequence]``."""
    x, _ = run_routed(decoder, units, ids, [threshold], kv_cache)
    with torch.no_grad():
        return decoder.head()(x[slice(0, len(ids))][:, 0].to(decoder.device)).cpu()

"""What routing costs in quality and saves in work, measured on token blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .decoder import Decoder
from .flops import Budget
from .progress import Reporter, Silent
from .routing import Units
from .stream import run_routed


@dataclass(frozen=True)
class Quality:
    """Figures of one threshold on a set of blocks.

    Attributes:
        perplexity: per token of the model's tokenizer, within blocks.
        agreement: share of positions whose most likely next token is the dense model's.
        sparsity: share of FLOPs saved, forecaster and router cost subtracted; 0 for the dense model itself.
        decisions: share of decisions that approximate.
        approximated: share of tokens approximated, by (layer, unit).
    """

    perplexity: float
    agreement: float
    sparsity: float
    decisions: float
    approximated: dict[tuple[int, str], float]


def evaluate(
    decoder: Decoder, units: Units, budget: Budget, ids: Tensor, thresholds: list[float], report: Reporter
) -> list[Quality]:
    """Measures the dense model and the routed one at each threshold, in one pass over the layers.

    Args:
        ids: token blocks ``[blocks, sequence]``.
        thresholds: execute where score > threshold.

    Returns:
        The dense model's figures, then those of each threshold.
    """
    x, approximated = run_routed(decoder, units, ids, [-math.inf, *thresholds], report, "evaluation")
    head = decoder.head()
    nll, agree = torch.zeros(len(x)), torch.zeros(len(x))
    with torch.no_grad():
        for block, tokens in enumerate(ids):
            logits = head(x[:, block].to(decoder.device))[:, :-1].cpu()
            nll += F.cross_entropy(logits.transpose(1, 2), tokens[1:].expand(len(x), -1), reduction="none").sum(1)
            best = logits.argmax(-1)
            agree += (best == best[0]).sum(1)
    count = ids[:, 1:].numel()
    results = []
    for k in range(len(x)):
        rates = {key: float(rate[k]) for key, rate in approximated.items()}
        results.append(
            Quality(
                perplexity=math.exp(float(nll[k]) / count),
                agreement=float(agree[k]) / count,
                sparsity=budget.sparsity(rates) if k else 0.0,
                decisions=budget.decisions(rates),
                approximated=rates,
            )
        )
    return results


def logits(decoder: Decoder, units: Units, ids: Tensor, threshold: float) -> Tensor:
    """Returns the routed model's fp32 logits ``[blocks, sequence, vocabulary]`` for ``ids[blocks, sequence]``."""
    x, _ = run_routed(decoder, units, ids, [threshold], Silent(), "logits")
    with torch.no_grad():
        return decoder.head()(x[0].to(decoder.device)).cpu()

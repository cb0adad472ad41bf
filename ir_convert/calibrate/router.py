"""Fits a router by regression on what approximating costs: no end-to-end training, no sampling of decisions.

The loss ``cost * exp(-z) + z`` has its minimum at z(h) = log E[cost | h] (a gamma likelihood with fixed shape), which
ranks tokens of all units on one scale: nats lost. Dividing by the unit's share of the FLOPs makes it nats per FLOP saved,
the quantity that a knapsack thresholds. Targets are noisy (a squared Gaussian around each token's expectation), so the
weights are decayed.
"""

import math

import torch
from torch import Tensor

from ..stream import Sample
from ..units import Router
from .descent import descend

STEPS, BATCH, LR, DECAY = 400, 2048, 1e-2, 3.0
# Costs are floored at this share of their mean, so that a token that costs nothing cannot drive its score to -inf.
FLOOR = 1e-4


def fit_router(h: Tensor, cost: Tensor, width: int, share: float, seed: int, sample: Sample) -> Router:
    """Fits a router.

    Args:
        h: this process's normalised hidden states ``[tokens, hidden]``.
        cost: what approximating each token costs ``[tokens]``, >= 0.
        width: hidden units; 0 scores all tokens alike.
        share: the share of the model's FLOPs that approximating saves.
        seed: of the initial weights and the batches.
        sample: draws the batches, of ``BATCH`` tokens over all processes.
    """
    generator, hidden = torch.Generator().manual_seed(seed), h.shape[1]
    scale = sample.mean(cost).clamp(min=1e-30)
    cost = (cost / scale).clamp(min=FLOOR)
    mean = sample.mean(h)
    spread = (sample.mean(h, torch.square) - mean.square()).clamp(min=1e-12).sqrt()
    parameters = [
        torch.randn(width, hidden, generator=generator).to(h.device) / hidden**0.5,
        torch.zeros(width, device=h.device),
        torch.zeros(1, width, device=h.device),
        torch.zeros(1, device=h.device),
    ]
    w1, b1, w2, b2 = (parameter.requires_grad_() for parameter in parameters)

    def folded() -> Router:
        """The router of raw hidden states whose parameters are for standardised ones."""
        raw = w1 / spread
        return Router(raw, b1 - raw @ mean, w2, b2)

    groups = [{"params": [w1, w2], "weight_decay": DECAY}, {"params": [b1, b2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def losses(rows: Tensor) -> Tensor:
        # index_select: several times as fast as h[rows] on a CPU.
        z = folded()(h.index_select(0, rows))
        return cost[rows] * torch.exp(-z) + z

    descend(optimizer, losses, steps=STEPS, batch=BATCH, warm_up=0.3, generator=generator, sample=sample)
    with torch.no_grad():
        router = folded()
        router.out_bias = b2 + torch.log(scale) - math.log(share)
        return Router(*(part.detach().float().contiguous() for part in vars(router).values()))

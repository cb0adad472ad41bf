"""Fits a router by regression on what approximating costs: no end-to-end training, no sampling of decisions.

The loss ``cost * exp(-z) + z`` has its minimum at z(h) = log E[cost | h] (a gamma likelihood with fixed shape), which
ranks tokens of all units on one scale: nats lost. Dividing by the unit's share of the FLOPs makes it nats per FLOP saved,
the quantity that a knapsack thresholds. Targets are noisy (a squared Gaussian around each token's expectation), so the
weights are decayed.
"""

import math

import torch
from torch import Tensor

from ..units import Router
from ..stream import Sample

STEPS, BATCH, LR, DECAY = 400, 4096, 1e-2, 3.0
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
    spread = (sample.mean(h.square()) - mean.square()).clamp(min=1e-12).sqrt()
    parameters = [
        torch.randn(width, hidden, generator=generator).to(h.device) / hidden**0.5,
        torch.zeros(width, device=h.device),
        torch.zeros(1, width, device=h.device),
        torch.zeros(1, device=h.device),
    ]
    router = Router(*(parameter.requires_grad_() for parameter in parameters))
    groups = [
        {"params": [router.hidden, router.out], "weight_decay": DECAY},
        {"params": [router.hidden_bias, router.out_bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for _ in range(STEPS):
        rows = sample.draw(BATCH, generator)
        z = router((h[rows] - mean) / spread)
        loss = (cost[rows] * torch.exp(-z) + z).sum() / BATCH
        gradients = sample.team.sum(torch.autograd.grad(loss, parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        w1, b1, w2, b2 = (parameter.detach() for parameter in parameters)
        # Fold the standardisation into the first layer, the scale and the FLOPs share into the last bias.
        folded = w1 / spread
        parts = (folded, b1 - folded @ mean, w2, b2 + torch.log(scale) - math.log(share))
        return Router(*(part.float().contiguous() for part in parts))

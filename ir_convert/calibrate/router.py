"""Fits a router by regression on what approximating costs: no end-to-end training, no sampling.

The loss ``cost * exp(-z) + z`` has its minimum at z(h) = log E[cost | h] (a gamma likelihood with fixed shape), which
ranks tokens of all units on one scale: nats lost. Dividing by the unit's share of the FLOPs makes it nats per FLOP saved,
the quantity that a knapsack thresholds.
"""

import math

import torch
from torch import Tensor

from ..units import Router

STEPS, BATCH, LR = 400, 4096, 1e-2
# Costs are floored at this share of their mean, so that a token that costs nothing cannot drive its score to -inf.
FLOOR = 1e-4


def fit_router(h: Tensor, cost: Tensor, width: int, share: float, seed: int) -> Router:
    """Fits a router.

    Args:
        h: normalised hidden states ``[tokens, hidden]``.
        cost: what approximating each token costs ``[tokens]``, >= 0.
        width: hidden units.
        share: the share of the model's FLOPs that approximating saves.
        seed: of the initial weights and the batches.
    """
    generator = torch.Generator(h.device).manual_seed(seed)
    tokens, hidden = h.shape
    scale = cost.mean().clamp(min=1e-30)
    cost = (cost / scale).clamp(min=FLOOR)
    mean, spread = h.mean(0), h.std(0).clamp(min=1e-6)
    h = (h - mean) / spread
    w1 = torch.randn(width, hidden, generator=generator, device=h.device) / hidden**0.5
    parameters = [w1, torch.zeros(width, device=h.device), torch.zeros(1, width, device=h.device)]
    parameters.append(torch.zeros(1, device=h.device))
    router = Router(*(parameter.requires_grad_() for parameter in parameters))
    optimizer = torch.optim.Adam(parameters, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(tokens, (min(BATCH, tokens),), generator=generator, device=h.device)
        z = router(h[rows])
        loss = (cost[rows] * torch.exp(-z) + z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        w1, b1, w2, b2 = (parameter.detach() for parameter in parameters)
        # Fold the standardisation into the first layer, the scale and the FLOPs share into the last bias.
        folded = w1 / spread
        router = Router(folded, b1 - folded @ mean, w2, b2 + torch.log(scale) - math.log(share))
    return Router(*(tensor.float().cpu().contiguous() for tensor in vars(router).values()))

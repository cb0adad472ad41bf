"""The training loop of the layer-by-layer fits: batches drawn over all processes, their gradients added up."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..stream import Sample


def descend(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    warm_up: float,
    generator: torch.Generator,
    sample: Sample,
) -> None:
    """Minimises the mean of ``losses(rows)`` (one for each of this process's tokens ``rows``) over batches of tokens.

    Args:
        optimizer: its learning rate is the peak of a one-cycle schedule.
        batch: tokens a step, over all processes.
        warm_up: the share of the steps in which the learning rate rises.
        generator: what draws the batches.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    peak = optimizer.defaults["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=warm_up)
    for _ in range(steps):
        loss = losses(sample.draw(batch, generator)).sum() / batch
        gradients = sample.team.sum(torch.autograd.grad(loss, parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()

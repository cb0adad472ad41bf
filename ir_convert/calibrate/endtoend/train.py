"""The training loop of every end-to-end stage: seeded batches, AdamW, a cosine, checks, and optionally averaged weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...progress import Reporter
from ..foreign import begin_alike
from .workers import Workers


@dataclass(frozen=True)
class Descent:
    """How one stage descends.

    Attributes:
        steps: optimiser steps.
        batch: blocks a step, over all processes.
        lr: AdamW's peak learning rate; it falls to 0 along a cosine.
        length: cuts blocks into shorter ones of so many tokens; None leaves them.
        micro_batch: blocks a process runs at once; None runs its whole share of the batch.
        weight_decay: AdamW's.
        average: end at the mean of the weights over the last third of the steps.
    """

    steps: int
    batch: int
    lr: float
    length: int | None = None
    micro_batch: int | None = None
    weight_decay: float = 0.0
    average: bool = False


@dataclass
class Trace:
    """What one stage saw, step by step.

    Attributes:
        stage: its name.
        loss: what was descended, the mean over processes.
        language: the part of it that judges the model's predictions, nats a token.
        saved: the share of FLOPs saved under the stage's own gates (noisy ones where it samples).
    """

    stage: str
    loss: list[float] = field(default_factory=list)
    language: list[float] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)


def cut(blocks: Tensor, length: int | None) -> Tensor:
    """Cuts blocks ``[count, sequence]`` into shorter ones ``[more, length]``; a remainder is dropped.

    Where all begin with the same token, which is not of the text then (BOS), each shorter one does.
    """
    if length is None or length >= blocks.shape[1]:
        return blocks
    first = blocks[:, : int(begin_alike(blocks))]
    body = length - first.shape[1]
    pieces = blocks[:, first.shape[1] :].unfold(1, body, body)  # [count, pieces, body]
    return torch.cat([first.unsqueeze(1).expand(-1, pieces.shape[1], -1), pieces], dim=2).flatten(0, 1)


def batches(count: int, descent: Descent, generator: torch.Generator) -> Tensor:
    """Draws the rows of every step ``[steps, batch]``: all of ``count`` in random order, then all again in another."""
    needed = descent.steps * descent.batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat([torch.empty(0, dtype=torch.long), *epochs])[:needed].view(descent.steps, descent.batch)


def descend(
    stage: str,
    groups: list[tuple[list[nn.Parameter], float]],
    compute: Callable[[int], Tensor],
    descent: Descent,
    workers: Workers,
    report: Reporter,
    tokens: int,
) -> Trace:
    """Trains parameters, and nothing else, for ``descent.steps`` steps.

    Args:
        stage: shown, and named by errors.
        groups: (parameters, learning rate); replaces ``descent.lr``.
        compute: runs a step's forward and backward passes on this process's share, so that the mean of all processes'
            gradients is the step's; returns up to three figures ``[loss, language, saved]``, whose mean is traced.
        tokens: a step, over all processes, for the display.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": lr} for group, lr in groups], weight_decay=descent.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, descent.steps))
    trace, mean = Trace(stage), _Mean(parameters)
    with workers.reporter(report).stage(stage, descent.steps, tokens) as advance:
        for step in range(descent.steps):
            optimizer.zero_grad()
            figures = workers.mean(compute(step)).tolist()
            for values, figure in zip((trace.loss, trace.language, trace.saved), figures, strict=False):
                values.append(figure)
            if not math.isfinite(figures[0]):
                raise UserError(
                    f"{stage}: the loss is {figures[0]} at step {step + 1} of {descent.steps}: it diverged; other text or "
                    "more steps may help, and --recipe local without --polish needs no such training"
                )
            workers.average_gradients(parameters)
            optimizer.step()
            cosine.step()
            if descent.average and 3 * (step + 1) > 2 * descent.steps:
                mean.add()
            advance()
    mean.apply()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return trace


class _Mean:
    """The running mean of parameters; equal values leave it exactly where they are."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters, self._count, self._mean = parameters, 0, list[Tensor]()

    @torch.no_grad()
    def add(self) -> None:
        self._count += 1
        if self._count == 1:
            self._mean = [parameter.detach().clone() for parameter in self._parameters]
        for mean, parameter in zip(self._mean, self._parameters, strict=True):
            mean.add_((parameter - mean) / self._count)

    @torch.no_grad()
    def apply(self) -> None:
        """Moves the parameters to their mean, if any was added."""
        for mean, parameter in zip(self._mean, self._parameters, strict=bool(self._mean)):
            parameter.copy_(mean)

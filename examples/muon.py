"""Muon, as torch.optim.Muon has it, in float32: on processors that have no bfloat16 that one takes as long as the model itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Of the quintic iteration that drives all singular values towards 1 (Keller Jordan's, 2024).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS, EPSILON = 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal.

    Args:
        matrices: parameters of two dimensions.
        lr, weight_decay, momentum: as torch.optim.Muon's.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the loss before the step")
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                updates.setdefault(matrix.shape, []).append((matrix, update))
            for (rows, columns), pairs in updates.items():  # one batch for each shape
                steps = orthogonal(torch.stack([update for _, update in pairs]))
                for (matrix, _), step in zip(pairs, steps, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(step, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """Returns ``x[batch, rows, columns]`` with all singular values near 1."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x

"""Fits a forecaster to a unit's outputs: reduced-rank ridge regression in closed form, then a short training of its activation.

With centred second moments Sxx, Sxy over calibration tokens, the ridge solution is W = (Sxx + aI)^-1 Sxy. The best rank-r
map projects it on the leading r eigenvectors Q of W' Sxx W (Izenman 1975): code = (W Q)' h, output = Q code. The activation
starts where it is straight: silu has no curvature at x = 2.3994, so a code scaled to small values around it passes unbent.

Products of a chunk of tokens are fp32, their sums float64. The ridge is 1e-3 of the mean variance, so the solve's condition
number is below about 1e3 * hidden, far from where float64 would lose the fp32 products' accuracy.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..stream import Sample, Team, chunks
from ..units import Forecaster
from .descent import descend

RIDGE = 1e-3
INFLECTION = 2.3994  # of silu, where it is straight
VALUE = INFLECTION / (1 + math.exp(-INFLECTION))  # of silu there, and its slope
SLOPE = VALUE / INFLECTION * (1 + INFLECTION / (1 + math.exp(INFLECTION)))
SPREAD = 0.25  # of the code around it
BENT_SPREAD, BENT_CENTRE = 1.5, 1.0  # where training starts it: there silu bends
BATCH, LR = 1024, 3e-2
EXACT, ITERATIONS = 768, 12  # up to this width eigenvectors are computed exactly; beyond, in so many iterations


class Moments:
    """Weighted first and second moments of (h, y), added up in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n, self.h, self.y, self.yy = zeros(1), zeros(inputs), zeros(outputs), zeros(1)
        self.hh, self.hy = zeros(inputs, inputs), zeros(inputs, outputs)

    def add(self, h: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Adds tokens ``h[..., inputs]``, ``y[..., outputs]``, each counted ``weight[...]`` times (once by default)."""
        h, y = h.flatten(0, -2), y.flatten(0, -2)
        weight = torch.ones_like(h[:, 0]) if weight is None else weight.flatten()
        weighted = h * weight.unsqueeze(1)
        self.n += weight.double().sum()
        self.h += weighted.double().sum(0)
        self.hh += weighted.T @ h
        self.hy += weighted.T @ y
        self.y += (y * weight.unsqueeze(1)).double().sum(0)
        self.yy += weight.double() @ (y * y).sum(1).double()

    @classmethod
    def of(cls, h: Tensor, y: Tensor, weight: Tensor | None = None) -> "Moments":
        """Returns those of tokens ``h[tokens, inputs]``, ``y[tokens, outputs]``, added a chunk at a time; see ``add``."""
        moments = cls(h.shape[1], y.shape[1], h.device)
        for rows in chunks(len(h), 1):
            moments.add(h[rows], y[rows], None if weight is None else weight[rows])
        return moments

    def share(self, team: Team) -> "Moments":
        """Adds up the moments of all processes, in place."""
        team.sum(vars(self).values())
        return self

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the ridge solution W ``[inputs, outputs]``, Sxx and Sxy, float64."""
        mean_h, mean_y = self.h / self.n, self.y / self.n
        sxx = self.hh / self.n - torch.outer(mean_h, mean_h)
        sxy = self.hy / self.n - torch.outer(mean_h, mean_y)
        # An activation that never varies has variance 0: the floor keeps the factorisation defined.
        shift = ridge * sxx.diagonal().mean().clamp(min=1e-12)
        identity = torch.eye(len(sxx), dtype=sxx.dtype, device=sxx.device)
        factor, failed = torch.linalg.cholesky_ex(sxx + shift * identity)
        if failed:  # rounding made variances of about 0 negative
            shift -= 2 * torch.linalg.eigvalsh(sxx)[0]
            factor = torch.linalg.cholesky(sxx + shift * identity)
        return torch.cholesky_solve(sxy, factor), sxx, sxy

    def fit(self, rank: int) -> tuple[Forecaster, Tensor]:
        """Returns the forecaster of this rank, and the share of the output's variance that ranks 0 .. rank leave unexplained.

        Its code is ordered: the first k of it, with the first k columns of ``up``, are the best forecaster of rank k.
        Rank 0 forecasts the mean.
        """
        mean_h, mean_y = self.h / self.n, self.y / self.n
        variance = (self.yy / self.n - (mean_y**2).sum()).clamp(min=1e-30)
        w, sxx, sxy = self.solve()
        q = leading_eigenvectors(w.T @ sxx @ w, rank)
        down = (w @ q).T
        explained = 2 * ((down @ sxy) * q.T).sum(1) - ((down @ sxx) * down).sum(1)
        unexplained = torch.cat([variance, (variance - explained.cumsum(0))]) / variance
        scale = SPREAD / ((down @ sxx) * down).sum(1).clamp(min=1e-30).sqrt()
        up = q / (SLOPE * scale)
        parts = (
            down * scale.unsqueeze(1),
            INFLECTION - scale * (down @ mean_h),
            up,
            mean_y - VALUE * up.sum(1),
        )
        return Forecaster(*(part.float().contiguous() for part in parts)), unexplained.float().cpu()


def leading_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Returns the eigenvectors ``[n, count]`` of the largest eigenvalues of a symmetric, positive ``matrix[n, n]``, largest first.

    Of a large matrix by orthogonal iteration with a Rayleigh-Ritz step (a full decomposition takes minutes at n = 4096);
    directions it leaves unsettled have nearly equal eigenvalues, and are worth nearly the same.
    """
    n = len(matrix)
    if n <= EXACT or 4 * count > n:
        return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, min(n, count + 32), generator=generator, dtype=torch.float64).to(matrix)
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(matrix @ q).Q
    inner = torch.linalg.eigh(q.T @ matrix @ q).eigenvectors.flip(1)[:, :count]
    return q @ inner


def truncated(forecaster: Forecaster, rank: int) -> Forecaster:
    """Returns the best forecaster of a smaller rank, from one that ``Moments.fit`` gave."""
    dropped = forecaster.up[:, rank:].sum(1) * VALUE
    return Forecaster(
        forecaster.down[:rank].contiguous(),
        forecaster.down_bias[:rank].contiguous(),
        forecaster.up[:, :rank].contiguous(),
        forecaster.bias + dropped,
    )


def train_activation(
    start: Forecaster, h: Tensor, y: Tensor, weight: Tensor, steps: int, seed: int, sample: Sample
) -> Forecaster:
    """Trains a closed-form forecaster on by Adam, its code moved to where the activation bends.

    Args:
        start: what ``Moments.fit`` gave, on the device of ``h``.
        h, y: this process's tokens ``[tokens, hidden]``.
        weight: how much each counts ``[tokens]``.
        steps: of Adam; 0 returns the start.
        seed: of the batches.
        sample: draws the batches, of ``BATCH`` tokens over all processes.
    """
    if start.rank == 0 or steps == 0:
        return start
    generator = torch.Generator().manual_seed(seed)
    wider = BENT_SPREAD / SPREAD
    down, down_bias = start.down * wider, (start.down_bias - INFLECTION) * wider + BENT_CENTRE
    start = _solve_second_layer(down, down_bias, h, y, weight, sample.team)
    scale = sample.mean(y, lambda part: part.square().mean(1)).sqrt().clamp(min=1e-12)
    parameters = [start.down, start.down_bias, start.up / scale, start.bias / scale]
    parameters = [parameter.clone().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.98), fused=True)

    def losses(rows: Tensor) -> Tensor:
        # index_select: several times as fast as h[rows] on a CPU.
        error = Forecaster(*parameters)(h.index_select(0, rows)) - y.index_select(0, rows) / scale
        return (error**2).sum(1) * weight[rows]

    descend(optimizer, losses, steps=steps, batch=BATCH, warm_up=0.1, generator=generator, sample=sample)
    return _solve_second_layer(parameters[0].detach(), parameters[1].detach(), h, y, weight, sample.team)


@torch.no_grad()
def _solve_second_layer(
    down: Tensor, down_bias: Tensor, h: Tensor, y: Tensor, weight: Tensor, team: Team
) -> Forecaster:
    """Returns the best forecaster with this first layer, in closed form."""
    code = F.silu(F.linear(h, down, down_bias))
    moments = Moments.of(code, y, weight).share(team)
    w, _, _ = moments.solve(ridge=1e-5)
    bias = moments.y / moments.n - (moments.h / moments.n) @ w
    return Forecaster(down, down_bias, w.T.float().contiguous(), bias.float())

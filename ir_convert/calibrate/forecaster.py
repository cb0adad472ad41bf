"""Fits a forecaster in closed form: reduced-rank ridge regression of the unit's output on its input.

With centred second moments Sxx, Sxy over calibration tokens, the ridge solution is W = (Sxx + aI)^-1 Sxy. The best rank-r
map projects it on the leading r eigenvectors Q of W' Sxx W (Izenman 1975): down = (W Q)', up = Q. Moments are accumulated
in float64 and the ridge is 1e-3 of the mean variance, so the solve's condition number stays below about 1e3 * hidden.
"""

import torch
from torch import Tensor

from ..units import Forecaster

RIDGE = 1e-3


class Moments:
    """Weighted first and second moments of (h, y), added up in float64."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n = 0.0
        self.h, self.y, self.yy = zeros(hidden), zeros(hidden), zeros(hidden)
        self.hh, self.hy = zeros(hidden, hidden), zeros(hidden, hidden)

    def add(self, h: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Adds tokens ``[..., hidden]``, each counted ``weight[...]`` times (once by default)."""
        h, y = h.flatten(0, -2).double(), y.flatten(0, -2).double()
        weighted = h if weight is None else h * weight.reshape(-1, 1)
        self.n += len(h) if weight is None else float(weight.sum())
        self.h += weighted.sum(0)
        self.hh += weighted.T @ h
        self.hy += weighted.T @ y
        weighted_y = y if weight is None else y * weight.reshape(-1, 1)
        self.y += weighted_y.sum(0)
        self.yy += (weighted_y * y).sum(0)

    def fit(self, rank: int) -> tuple[Forecaster, float]:
        """Returns the best forecaster of this rank, and the share of the output's variance that it leaves unexplained.

        Rank 0 gives the forecaster that forecasts zero: routing then skips, as greedy routing does.
        """
        hidden = len(self.h)
        if rank == 0:
            empty = torch.zeros(0, hidden)
            return Forecaster(empty, empty.T.contiguous(), torch.zeros(hidden)), 1.0
        mean_h, mean_y = self.h / self.n, self.y / self.n
        sxx = self.hh / self.n - torch.outer(mean_h, mean_h)
        sxy = self.hy / self.n - torch.outer(mean_h, mean_y)
        ridge = RIDGE * sxx.diagonal().mean()
        factor = torch.linalg.cholesky(sxx + ridge * torch.eye(hidden, dtype=sxx.dtype, device=sxx.device))
        w = torch.cholesky_solve(sxy, factor)
        q = torch.linalg.eigh(w.T @ sxx @ w).eigenvectors[:, -rank:]
        down = (w @ q).T
        bias = mean_y - q @ (down @ mean_h)
        variance = (self.yy / self.n - mean_y**2).sum()
        residual = variance - 2 * ((down @ sxy) * q.T).sum() + (down @ sxx * down).sum()
        return Forecaster(*(t.float().cpu().contiguous() for t in (down, q, bias))), float(residual / variance)

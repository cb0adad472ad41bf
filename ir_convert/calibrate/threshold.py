"""Measures the sparsity -> threshold curve on held-out blocks, decisions made as they will be: by threshold, under routing."""

import numpy as np
import torch
from torch import Tensor

from ..decoder import Decoder
from ..flops import Budget
from ..progress import Reporter
from ..routing import Curve, Units
from ..stream import run_routed

QUANTILES = 257
SPACING = 0.08
NEAR = (-0.015, 0.0, 0.015)


def score_quantiles(scores: Tensor) -> Tensor:
    """Returns evenly spaced quantiles of one unit's scores ``[tokens]``, fp32 on the CPU."""
    ordered = scores.float().flatten().sort().values.cpu()
    return ordered[torch.linspace(0, len(ordered) - 1, QUANTILES).round().long()]


def measure_curve(
    decoder: Decoder,
    units: Units,
    budget: Budget,
    quantiles: dict[tuple[int, str], Tensor],
    ids: Tensor,
    asked: float,
    report: Reporter,
) -> Curve:
    """Measures the achieved sparsity at thresholds over the whole range, then again close to the asked one.

    Args:
        quantiles: score quantiles of each unit; they only place the first thresholds.
        ids: held-out token blocks ``[blocks, sequence]``.
        asked: the sparsity that must be met best.
    """
    points: dict[float, float] = {}

    def measure(thresholds: list[float]) -> Curve:
        thresholds = [float(np.float32(t)) for t in thresholds]
        _, approximated = run_routed(decoder, units, ids, thresholds, report, "threshold")
        for k, threshold in enumerate(thresholds):
            points[threshold] = budget.sparsity({key: float(rates[k]) for key, rates in approximated.items()})
        return _rising(points)

    values = torch.cat([quantiles[key] for key in units])
    shares = torch.cat([torch.full((QUANTILES,), budget.share(unit) / QUANTILES) for _, unit in units])
    order = values.argsort()
    predicted = shares[order].cumsum(0) - budget.overhead_share
    grid = np.arange(0, budget.reachable, SPACING)
    everything = float(values.max()) + 1.0
    curve = measure([*np.interp(grid, predicted.numpy(), values[order].numpy()), everything])
    if asked <= 0:
        return curve
    return measure([float(np.interp(asked + step, curve.sparsity, curve.threshold)) for step in NEAR])


def _rising(points: dict[float, float]) -> Curve:
    """Orders measured points; where sampling noise makes sparsity fall as the threshold rises, the later point is dropped."""
    curve = Curve([], [])
    for threshold, sparsity in sorted(points.items()):
        if not curve.sparsity or sparsity > curve.sparsity[-1]:
            curve.threshold.append(threshold)
            curve.sparsity.append(sparsity)
    return curve

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
BEYOND = 10.0  # so far above the highest score seen that nothing executes
WIDE, NEAR = (-0.12, -0.06, 0.0, 0.06, 0.12), (-0.015, 0.0, 0.015)


class Meter:
    """Measures thresholds on held-out blocks.

    Args:
        decoder: the base model.
        budget: what an approximated token saves.
        quantiles: ``score_quantiles`` of each unit; they only say where to look first.
        ids: held-out token blocks ``[blocks, sequence]``.
    """

    def __init__(
        self,
        decoder: Decoder,
        budget: Budget,
        quantiles: dict[tuple[int, str], Tensor],
        ids: Tensor,
        report: Reporter,
    ) -> None:
        self._decoder, self._budget, self._ids, self._report = decoder, budget, ids, report
        scores = torch.cat(list(quantiles.values()))
        shares = torch.cat([torch.full((QUANTILES,), budget.share(unit) / QUANTILES) for _, unit in quantiles])
        order = scores.argsort()
        self._scores = scores[order].double().numpy()
        self._predicted = (shares[order].double().cumsum(0) - budget.overhead_share).numpy()

    def near(self, units: Units, asked: float) -> float:
        """Returns about the threshold of the asked sparsity, from a few measurements around it."""
        curve = self._measure(units, self._predict([asked + step for step in WIDE]))
        return float(np.interp(asked, curve.sparsity, curve.threshold))

    def curve(self, units: Units, asked: float) -> Curve:
        """Measures the whole range, then again close to the asked sparsity."""
        grid = list(np.arange(0, self._budget.reachable, SPACING))
        curve = self._measure(units, [*self._predict(grid), float(self._scores[-1]) + BEYOND])
        if asked <= 0:
            return curve
        close = np.interp([asked + step for step in NEAR], curve.sparsity, curve.threshold)
        refined = self._measure(units, [float(threshold) for threshold in close])
        return _rising([*_points(curve), *_points(refined)])

    def _predict(self, sparsity: list[float]) -> list[float]:
        """Thresholds that would give these sparsities if approximating did not shift later units' inputs."""
        return [float(threshold) for threshold in np.interp(sparsity, self._predicted, self._scores)]

    def _measure(self, units: Units, thresholds: list[float]) -> Curve:
        thresholds = [float(np.float32(threshold)) for threshold in sorted(set(thresholds))]
        _, approximated = run_routed(self._decoder, units, self._ids, thresholds, self._report, "threshold")
        rates = [{key: float(rate[k]) for key, rate in approximated.items()} for k in range(len(thresholds))]
        return _rising([(t, self._budget.sparsity(rate)) for t, rate in zip(thresholds, rates, strict=True)])


def score_quantiles(scores: Tensor) -> Tensor:
    """Returns ``QUANTILES`` evenly spaced quantiles of one unit's scores ``[tokens]``, fp32 on the CPU."""
    ordered = scores.float().flatten().sort().values.cpu()
    return ordered[torch.linspace(0, len(ordered) - 1, QUANTILES).round().long()]


def _points(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.threshold, curve.sparsity, strict=True))


def _rising(points: list[tuple[float, float]]) -> Curve:
    """Orders (threshold, sparsity) points; one that does not save more than a lower threshold's is dropped."""
    curve = Curve([], [])
    for threshold, sparsity in sorted(points):
        if not curve.sparsity or sparsity > curve.sparsity[-1]:
            curve.threshold.append(threshold)
            curve.sparsity.append(sparsity)
    return curve

"""Measures the sparsity -> threshold curve on held-out blocks, decisions made as they will be: by threshold, under routing."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..decoder import Decoder
from ..evaluate import sparsity_by_block, standard_error
from ..flops import Budget, Key
from ..progress import Reporter
from ..routing import Curve
from ..stream import Team, Work, run_routed
from ..units import Units

QUANTILES = 513
BEYOND = 10.0  # so far above the highest score seen that nothing executes
SPACING = 0.08
TOP = (0.03, 0.005)  # below all that can be saved: from there on thresholds rise steeply
CLOSE = (-0.02, 0.0, 0.02)
WIDE = (-0.08, 0.0, 0.08)
ATTEMPTS = 3


@dataclass
class Meter:
    """Measures thresholds on held-out blocks.

    Attributes:
        decoder: the base model.
        ids: held-out blocks ``[blocks, sequence]`` of all processes.
        kv_cache: ``full`` or ``strict``.
        errors: standard error of each measured sparsity, by threshold.
    """

    decoder: Decoder
    ids: Tensor
    kv_cache: str
    work: Work
    team: Team
    report: Reporter
    errors: dict[float, float] = field(default_factory=dict)

    def near(self, units: Units, scores: dict[Key, Tensor], asked: float, name: str = "near") -> float:
        """Returns about the threshold of the asked sparsity, from a few measurements around it, kept under ``name``."""
        budget = Budget.of(self.decoder.config, units, self.kv_cache)
        guesses = self._predict(budget, scores, [asked + step for step in WIDE])
        for attempt in range(ATTEMPTS):
            curve = self._measure(units, budget, guesses, f"{name}.{attempt}")
            if len(curve.sparsity) < 2 or curve.sparsity[0] <= asked <= curve.sparsity[-1]:
                break
            # Routing shifted the stream further than that: look where a straight line through the points leads.
            slope, level = np.polyfit(curve.sparsity, curve.threshold, 1)
            guesses = [float(level + slope * (asked + step)) for step in WIDE]
        return float(np.interp(asked, curve.sparsity, curve.threshold))

    def curve(self, units: Units, scores: dict[Key, Tensor], asked: float, near: tuple[float, float]) -> Curve:
        """Measures the whole range, most closely around the asked sparsity.

        Args:
            scores: the routers' scores on the dense stream ``[tokens]``; they only say where to look.
            near: a sparsity and its threshold, measured: says how far routing shifts what the scores predict.
        """
        budget = Budget.of(self.decoder.config, units, self.kv_cache)
        grid = [*np.arange(0.01, budget.reachable, SPACING), *(asked + step for step in CLOSE)]
        grid += [budget.reachable - step for step in TOP if step < budget.reachable]
        shift = near[1] - self._predict(budget, scores, [near[0]])[0]
        thresholds = [threshold + shift for threshold in self._predict(budget, scores, grid)]
        highest = max(float(values.max()) for values in scores.values())
        return self._measure(units, budget, [*thresholds, highest + BEYOND], "curve")

    def _predict(self, budget: Budget, scores: dict[Key, Tensor], sparsity: list[float]) -> list[float]:
        """Thresholds that would give these sparsities if approximating did not shift later units' inputs."""
        values = torch.cat([score_quantiles(score) for score in scores.values()])
        shares = torch.cat([torch.full((QUANTILES,), budget.share(unit) / QUANTILES) for _, unit in scores])
        order = values.argsort()
        saved = shares[order].double().cumsum(0) - budget.overhead_share
        return [float(threshold) for threshold in np.interp(sparsity, saved.numpy(), values[order].double().numpy())]

    def _measure(self, units: Units, budget: Budget, thresholds: list[float], name: str) -> Curve:
        thresholds = [float(np.float32(threshold)) for threshold in sorted(set(thresholds))]

        def compute() -> dict[str, Tensor]:
            x, approximated = run_routed(
                self.decoder,
                units,
                self.team.mine(self.ids),
                thresholds,
                self.kv_cache,
                self.report,
                f"threshold.{name}",
                self.work,
            )
            x.discard()
            return {"saved": sparsity_by_block(budget, approximated)}

        saved = self.team.gather(self.work.once(f"thresholds.{name}", compute)["saved"], len(self.ids), axis=1)
        self.errors |= {threshold: standard_error(row) for threshold, row in zip(thresholds, saved, strict=True)}
        return _rising(thresholds, saved.double().mean(1).tolist())


def score_quantiles(scores: Tensor) -> Tensor:
    """Returns ``QUANTILES`` evenly spaced quantiles of one unit's scores ``[tokens]``, fp32 on the CPU."""
    ordered = scores.float().flatten().sort().values.cpu()
    return ordered[torch.linspace(0, len(ordered) - 1, QUANTILES).round().long()]


def _rising(thresholds: list[float], sparsity: list[float]) -> Curve:
    """Makes a curve of measured points; one that does not save more than a lower threshold's is dropped."""
    curve = Curve([], [])
    for threshold, saved in zip(thresholds, sparsity, strict=True):
        if not curve.sparsity or saved > curve.sparsity[-1]:
            curve.threshold.append(threshold)
            curve.sparsity.append(saved)
    return curve

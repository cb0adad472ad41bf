"""Figures of a routed model on several texts, in two views.

- deployed: one threshold, set on the calibration's held-out blocks; what is saved then differs from text to text.
- exact: for each text the threshold is moved until that text saves what was asked. Measured closely on both sides of the
  asked sparsity; log-perplexity, KL and agreement are interpolated linearly in the sparsity between the two.

Pooled: over all texts' blocks (deployed), or the geometric mean of perplexities and the mean of the rest (exact).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ir_convert.decoder import Decoder
from ir_convert.evaluate import measure, sparsity_by_block
from ir_convert.flops import Budget
from ir_convert.stream import run_routed
from ir_convert.units import Units

POOLED = "pooled"
ROUNDS, TOLERANCE, CLOSE = 10, 0.015, 0.01
PROBE_BLOCKS = 16  # of a text, to find about where its threshold lies

Figures = dict[str, float]
# The share of FLOPs saved at each of some thresholds.
Saved = Callable[[list[float]], list[float]]


@dataclass
class Routed:
    """What a method gives.

    Attributes:
        start: about the threshold of the asked sparsity.
        spread: a step of the threshold that moves the sparsity by a few hundredths.
    """

    units: Units
    decoder: Decoder
    kv_cache: str
    start: float
    spread: float


class OutOfReachError(Exception):
    """No threshold saves the asked share."""


def saved_on(routed: Routed, ids: torch.Tensor) -> Saved:
    budget = Budget.of(routed.decoder.config, routed.units, routed.kv_cache)

    def saved(thresholds: list[float]) -> list[float]:
        x, approximated = run_routed(routed.decoder, routed.units, ids, thresholds, routed.kv_cache)
        x.discard()
        return sparsity_by_block(budget, approximated).double().mean(1).tolist()

    return saved


def seek(saved: Saved, asked: float, start: float, spread: float) -> tuple[float, float]:
    """Finds the threshold that saves ``asked``.

    Returns:
        The threshold, interpolated between two measured ones that enclose it, and how much it moves for a unit of sparsity.

    Raises:
        OutOfReachError: it could not be enclosed.
    """
    points: dict[float, float] = {}
    new, reach, best = [start - spread, start, start + spread], spread, None
    for _ in range(ROUNDS):
        points |= zip(new, saved(new), strict=True)
        thresholds = sorted(points)
        sparsity = np.maximum.accumulate([points[threshold] for threshold in thresholds])
        after = int(np.searchsorted(sparsity, asked))
        reach *= 2
        if asked < sparsity[0]:
            new = [thresholds[0] - reach]
        elif after == len(sparsity):
            new = [thresholds[-1] + reach]
        else:
            low, high = max(0, after - 1), max(1, after)
            gap = max(float(sparsity[high] - sparsity[low]), 1e-9)
            slope = (thresholds[high] - thresholds[low]) / gap
            best = thresholds[low] + (asked - float(sparsity[low])) * slope, slope
            if gap <= 2 * TOLERANCE:
                return best
            new = [best[0] - TOLERANCE / 2 * slope, best[0] + TOLERANCE / 2 * slope]
    if best is None:
        raise OutOfReachError
    return best


def figures(routed: Routed, ids: torch.Tensor, thresholds: list[float]) -> list[Figures]:
    """Returns the dense model's figures, then those at each threshold."""
    measured = measure(routed.decoder, routed.units, ids, thresholds, routed.kv_cache)
    rows = []
    for index, threshold in enumerate([-math.inf, *thresholds]):
        quality = measured.quality(index)
        rows.append(
            {
                "log_perplexity": math.log(quality.perplexity),
                "kl": quality.kl,
                "agreement": quality.agreement,
                "achieved": quality.sparsity,
                "achieved_error": quality.sparsity_error,
                "decisions": quality.decisions,
                "threshold": threshold,
            }
        )
    return rows


def interpolate(rows: list[Figures], asked: float) -> Figures:
    """Interpolates all figures linearly between the two measured sparsities closest around ``asked``.

    Raises:
        OutOfReachError: ``asked`` is outside of what was measured.
    """
    below = [row for row in rows if row["achieved"] <= asked]
    above = [row for row in rows if row["achieved"] >= asked]
    if not below or not above:
        raise OutOfReachError
    low, high = max(below, key=lambda row: row["achieved"]), min(above, key=lambda row: row["achieved"])
    gap = high["achieved"] - low["achieved"]
    share = (asked - low["achieved"]) / gap if gap else 0.0
    mixed = {name: low[name] + share * (high[name] - low[name]) for name in low if math.isfinite(low[name])}
    return mixed | {"bracket_low": low["achieved"], "bracket_high": high["achieved"]}


def deploy(routed: Routed, held_out: torch.Tensor, asked: float) -> tuple[float, float]:
    """Sets the threshold on the calibration's held-out blocks; returns it, and how much it moves for a unit of sparsity."""
    return seek(saved_on(routed, held_out), asked, routed.start, routed.spread)


def two_views(
    routed: Routed, threshold: float, slope: float, texts: dict[str, torch.Tensor], asked: float
) -> list[dict[str, Any]]:
    """Measures every text in both views.

    Args:
        threshold, slope: what ``deploy`` gave.
        texts: blocks to measure on, by name.
    """
    spread = max(4 * TOLERANCE * abs(slope), 1e-6)
    deployed, exact = {}, {}
    for name, ids in texts.items():
        probe = ids[torch.linspace(0, len(ids) - 1, min(PROBE_BLOCKS, len(ids))).long()]
        own, slope = seek(saved_on(routed, probe), asked, threshold, spread)
        deployed[name], exact[name] = _around(routed, ids, asked, threshold, own, slope)
    return as_rows(deployed, exact, {name: len(ids) for name, ids in texts.items()})


def _around(
    routed: Routed, ids: torch.Tensor, asked: float, deployed: float, own: float, slope: float
) -> tuple[Figures, Figures]:
    rows: list[Figures] = []
    wanted = [deployed, own - CLOSE * slope, own + CLOSE * slope]
    for _ in range(4):
        rows += figures(routed, ids, wanted)[1:]
        try:
            return rows[0], interpolate(rows[1:], asked)
        except OutOfReachError:
            nearest = min(rows[1:], key=lambda row: abs(row["achieved"] - asked))
            miss = asked - nearest["achieved"]
            beyond = miss + math.copysign(2 * CLOSE, miss)
            wanted = [nearest["threshold"] + beyond * slope]
    raise OutOfReachError


def as_rows(deployed: dict[str, Figures], exact: dict[str, Figures], weights: dict[str, int]) -> list[dict[str, Any]]:
    """Adds the pooled figures and names every row's source and view."""
    pooled = {"deployed": _mean(deployed, weights), "exact": _mean(exact, dict.fromkeys(exact, 1))}
    views = {"deployed": deployed | {POOLED: pooled["deployed"]}, "exact": exact | {POOLED: pooled["exact"]}}
    return [
        {"source": source, "view": view, "perplexity": math.exp(row["log_perplexity"])}
        | {name: value for name, value in row.items() if math.isfinite(value)}
        for view, by_source in views.items()
        for source, row in by_source.items()
    ]


def _mean(by_source: dict[str, Figures], weights: dict[str, int]) -> Figures:
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    names = ("log_perplexity", "kl", "agreement", "achieved", "decisions")
    mean = {name: sum(shares[source] * row[name] for source, row in by_source.items()) for name in names}
    errors = [shares[source] * row["achieved_error"] for source, row in by_source.items()]
    return mean | {"achieved_error": math.sqrt(sum(error**2 for error in errors))}

"""Measures a routed model against dense ones: thresholds that save what is asked, times in turn, and the ideal beside them."""

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers
from numpy.typing import NDArray
from speed_ideal import decode_ideal, prefill_ideal, sparsity
from speed_session import Cache, Point, Probe, Runner, room_for_logits, supports_in_place
from transformers import PretrainedConfig

import ir_convert
from ir_convert.flops import Budget
from ir_convert.units import Units

CLOSE, FAR = 0.004, 0.03  # a search for a threshold ends here; a worse result than the latter is refused
TRIES = 10
# Seconds before each turn: the threads of the session before spin on when its run has ended, for some 20 ms, and where all cores
# are theirs, that is time taken from the next, as much of a short run as of a long one.
REST = 0.05
# Sparsity may differ by this between a plan and what is timed: a score beside the threshold, rounded otherwise. In fp16, and in
# int4, where activations are rounded to 8 bits, one that falls differently moves all scores after it; the ideal is then off by as
# much.
SAME = {"fp32": 0.004, "fp16": 0.015, "int4": 0.015}
# By functions; by native kernels, without and with CUDA graphs.
NATIVE, GRAPH = ("native", "native_graph"), "_graph"
ROUTED = ("routed", *NATIVE)
DENSE_NATIVE = "own_native"
SPARSITIES = (0.0, 0.25, 0.4, 0.55)
# Routed over dense, over the ideal of that; at sparsity 0, where every token executes, routed over dense itself.
TARGETS = {("prefill", "fp32"): 1.05, ("prefill", "int4"): 1.05, ("decode", "fp32"): 1.10, ("decode", "int4"): 1.20}
MOST_AT_ZERO, FROM_TOKENS = 1.03, 512

Tokens = Sequence[NDArray[np.int64]]


@dataclass
class Plan:
    """What one point is run with: tokens of its steps, and for every sparsity asked a threshold and what comes of it.

    Attributes:
        precision: of the model: fp32, fp16 or int4.
        logits: that it gives: of all tokens, or of each sequence's last.
    """

    point: Point
    steps: Tokens
    precision: str
    logits: str = "all"
    chosen: list[dict[str, float]] = field(default_factory=list)


def draw_tokens(config: PretrainedConfig, point: Point, steps: int) -> Tokens:
    """Draws the tokens of every step; a prefill has one."""
    generator = np.random.default_rng(point.total * 1000 + point.batch)
    count = steps if point.kind == "decode" else 1
    return [generator.integers(3, config.vocab_size, (point.batch, point.tokens)) for _ in range(count)]


def plan(
    probe: Probe,
    units: Units,
    points: Sequence[Point],
    asked: Sequence[float],
    steps: int,
    precision: str,
    logits: str = "all",
) -> list[Plan]:
    """Finds the thresholds that save what is asked on the very tokens that will be timed, and the ideals."""
    starts = dict.fromkeys(asked, 0.0)
    plans = []
    for point in points:
        this = Plan(point, draw_tokens(probe.config, point, steps), precision, logits)
        for wanted in asked:
            row = _choose(probe, units, this, wanted, starts[wanted])
            if wanted:
                starts[wanted] = row["threshold"]  # other tokens of the same model want about the same one
            this.chosen.append(row)
        plans.append(this)
    return plans


def _choose(probe: Probe, units: Units, this: Plan, wanted: float, start: float) -> dict[str, float]:
    tried: dict[float, list[dict[str, Any]]] = {}

    def run(threshold: float) -> float:
        if threshold not in tried:
            tried[threshold] = [probe.run(this.point, ids, threshold) for ids in this.steps]
        return statistics.fmean(call["saved"] for call in tried[threshold])

    config, threshold = probe.config, -math.inf
    if wanted:
        budget = Budget.of(config, units)
        threshold = seek(run, wanted, start, budget.reachable, budget.overhead_share)
    said = run(threshold)
    flags = [call["executes"] for call in tried[threshold]]
    counted = sparsity(config, units, flags)
    if abs(counted - said) > 1e-3:
        raise RuntimeError(f"the model says it saved {said:.4f}, its decisions say {counted:.4f}")
    ideal = (
        decode_ideal(config, units, flags, this.precision)
        if this.point.kind == "decode"
        else prefill_ideal(config, units, flags[0], logits=this.logits)
    )
    rates = [1 - np.mean([call[key].mean() for call in flags]) for key in flags[0]]
    return {
        "asked": wanted,
        "threshold": threshold,
        "achieved": said,
        "ideal": ideal,
        "approximated": float(np.mean(rates)),
        "approximated_least": float(min(rates)),  # of the units: decisions are spread, or they are not
        "approximated_most": float(max(rates)),
        "attention": float(np.mean([call[key].mean() for call in flags for key in call if key[1] == "attention"])),
    }


def seek(
    saved: Callable[[float], float], wanted: float, start: float, reachable: float, overhead: float = 0.0
) -> float:
    """Returns the threshold that saves nearest to what is wanted, of those tried.

    Scores are about standard normal: in units of the normal quantile of the share of decisions, what is saved is about a
    line of slope 1. A step goes by the slope seen last, or halves what is left where that leads out of it.

    Raises:
        RuntimeError: nothing near was found.
    """

    def quantile(saving: float) -> float:
        share = (saving + overhead) / (reachable + overhead)
        return NormalDist().inv_cdf(min(0.99, max(0.01, share)))

    threshold, best, low, high = start or quantile(wanted), (math.inf, 0.0), -math.inf, math.inf
    seen: list[tuple[float, float]] = []
    for _ in range(TRIES):
        got = saved(threshold)
        best = min(best, (abs(got - wanted), threshold))
        if best[0] <= CLOSE:
            break
        low, high = (threshold, high) if got < wanted else (low, threshold)
        seen.append((threshold, quantile(got)))
        slope = 1.0
        if len(seen) > 1:
            (before, was), (after, now) = seen[-2:]
            slope = min(10.0, max(0.5, (now - was) / (after - before)))
        threshold += (quantile(wanted) - quantile(got)) / slope
        if not low < threshold < high:
            threshold = (low + high) / 2
    if best[0] > FAR:
        raise RuntimeError(f"no threshold saves {wanted:.3f}: {best[0]:.3f} off at {best[1]:.3f}")
    return best[1]


def time_in_turn(runners: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls all runners in turn, round after round, every other round backwards; returns their seconds by round."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    for index in range(rounds):
        for name in list(runners)[:: -1 if index % 2 else 1]:
            time.sleep(REST)
            times[name].append(runners[name]())
    return times


def compare(
    sessions: Mapping[str, ort.InferenceSession],
    config: PretrainedConfig,
    plans: Sequence[Plan],
    rounds: int,
    device: str = "cpu",
    cache: str = "auto",
    clock: str = "wall",
) -> Iterator[dict[str, Any]]:
    """Times every plan; yields a record for each sparsity of each.

    Args:
        sessions: ``routed``, perhaps ``native`` (the same model with native kernels), and dense ones: ``own`` and perhaps
            ``genai``, which always writes its cache in place, and ``own_native``, which nobody is compared with who has not these
            kernels. One whose name ends in ``_graph`` captures CUDA graphs, which
            is left to decode.
        config: of the model.
        plans: from ``plan``.
        rounds: of times taken in turn.
        device: cpu or cuda.
        cache: ``concat``, ``in-place``, or ``auto``: in place for decode where the model can.
        clock: of ``CLOCKS``.
    """
    able = cache == "in-place" or (
        cache == "auto"
        and all(
            supports_in_place(sessions[name], config, precision, device)
            for precision in {this.precision for this in plans}
            for name in ("routed", "own")
        )
    )
    for this in plans:
        in_place = able and (this.point.kind == "decode" or cache == "in-place")
        logits = room_for_logits(sessions["own"], config, this.point, device)
        named = [name for name in sessions if this.point.kind == "decode" or not name.endswith(GRAPH)]
        dense = [name for name in named if name not in ROUTED]
        places = {name: in_place or name == "genai" for name in named}  # which always writes its cache in place
        calls: list[tuple[str, str, float | None]] = [(name, name, None) for name in dense]
        for row, name in itertools.product(this.chosen, [name for name in ROUTED if name in named]):
            calls.append((f"{name} {row['asked']:g}", name, row["threshold"]))
        # All read the same past, and each writes its own token before it reads it: one cache of a kind does for all.
        caches = {kind: Cache(sessions["own"], config, this.point, kind, device) for kind in set(places.values())}
        runners = {
            call: Runner(
                *(sessions[name], config, this.point, this.steps, threshold, places[name]),
                *(device, clock, logits, name.endswith(GRAPH), caches[places[name]]),
            )
            for call, name, threshold in calls
        }
        times = time_in_turn(runners, rounds)
        rivals = [name for name in dense if name != DENSE_NATIVE]
        fastest = min(rivals, key=lambda name: statistics.median(times[name]))
        for row in this.chosen:
            name = f"routed {row['asked']:g}"
            ratio, quartiles = _ratio(times[name], times[fastest])
            saved = {
                call: runners[call].saved() for which in ROUTED if (call := f"{which} {row['asked']:g}") in runners
            }
            for call, share in saved.items():
                if abs(share - row["achieved"]) > SAME[this.precision]:
                    raise RuntimeError(f"{call} saved {share:.4f}; the plan was {row['achieved']:.4f}")
            yield {
                "kind": this.point.kind,
                "tokens": this.point.tokens,
                "cached": this.point.cached,
                "batch": this.point.batch,
                **row,
                "threshold": row["threshold"] if math.isfinite(row["threshold"]) else str(row["threshold"]),
                "achieved": saved[name],
                "cache": "in-place" if in_place else "concat",
                "dense": fastest,
                "dense_ms": {other: 1e3 * statistics.median(times[other]) for other in dense},
                "routed_ms": 1e3 * statistics.median(times[name]),
                "ratio": ratio,
                "ratio_quartiles": quartiles,
            } | _native(times, saved, f"{row['asked']:g}", fastest)


def target(record: Mapping[str, Any], ratio: float) -> tuple[float, float] | None:
    """Returns (what is judged of a ratio to dense, the most it may be); None where nothing was promised."""
    if record["asked"] == 0:
        return ratio, MOST_AT_ZERO
    most = TARGETS.get((record["kind"], record["precision"]))
    if most is None or (record["kind"] == "prefill" and record["tokens"] < FROM_TOKENS):
        return None
    return ratio / record["ideal"], most


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ir_convert": ir_convert.__version__,
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float]]:
    """Returns the median of the rounds' ratios, and their quartiles."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    quarters = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return statistics.median(ratios), [quarters[0], quarters[2]]


def _native(times: Mapping[str, Sequence[float]], saved: Mapping[str, float], asked: str, dense: str) -> dict[str, Any]:
    """Returns what native kernels saved, their times, and over those of the functions and of dense models; nothing without them."""
    found: dict[str, Any] = {}
    for native in NATIVE:
        if (own := times.get(f"{native} {asked}")) is None:
            continue
        ratio, quartiles = _ratio(own, times[f"routed {asked}"])
        found |= {
            f"{native}_achieved": saved[f"{native} {asked}"],
            f"{native}_ms": 1e3 * statistics.median(own),
            f"{native}_ratio": _ratio(own, times[dense])[0],
            f"{native}_to_functions": ratio,
            f"{native}_to_functions_quartiles": quartiles,
        }
        if DENSE_NATIVE in times:
            found[f"{native}_to_native_dense"] = _ratio(own, times[DENSE_NATIVE])[0]
    return found

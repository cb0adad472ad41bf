"""The methods that the quality table compares, and the job that runs one of them in a process of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from quality_measure import OutOfReachError, Routed, as_rows, deploy, figures, two_views
from quality_setting import code_sha256, resident
from quality_static import drop_order, drops, measure_drops
from torch import Tensor

from ir_convert.calibrate import Options
from ir_convert.calibrate.calibrate import check_reachable
from ir_convert.calibrate.fitted import Fitted
from ir_convert.calibrate.forecaster import Moments
from ir_convert.calibrate.recipes import fit, polish
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Blocks
from ir_convert.decoder import Decoder
from ir_convert.errors import UserError
from ir_convert.flops import Budget
from ir_convert.progress import Silent
from ir_convert.stream import Result, Team, Work
from ir_convert.units import Forecaster, RoutedUnit, Router

# Methods that share one fit stand together; what the table prints for each.
GROUPS = (("dense",), ("static",), ("local", "polish", "random"), ("paper",), ("greedy-local",), ("greedy",),
          ("mlp-only",), ("strict",))  # fmt: skip
LABELS = {
    "dense": "dense",
    "local": "informed, local recipe",
    "polish": "informed, local + polish",
    "paper": "informed, paper recipe",
    "greedy-local": "greedy, local routers",
    "greedy": "greedy, end to end",
    "random": "random routing, local forecasters",
    "static": "static dropping",
    "mlp-only": "informed, MLP only",
    "strict": "informed, strict K/V",
}
SEEDLESS = ("dense", "static")
END_TO_END = ("paper", "greedy")  # nothing that they learn serves two sparsities


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        methods: of one group, measured after one fit.
        sparsities: static dropping's search and the local recipe's dense passes serve all; the rest of a fit is for one.
        texts: blocks to measure on, by name.
    """

    model: str
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seed: int
    blocks: Blocks
    texts: dict[str, Tensor]
    steps: int
    polish: int
    device: str


def options_of(method: str, sparsity: float, seed: int, steps: int) -> Options:
    plain = Options(sparsity=sparsity, seed=seed)
    return {
        "local": plain,
        "paper": replace(plain, recipe="paper", steps=steps),
        "greedy-local": replace(plain, rank=0),
        "greedy": replace(plain, recipe="greedy", steps=steps),
        "mlp-only": replace(plain, units=("mlp",)),
        "strict": replace(plain, kv_cache="strict"),
    }[method]


def run_job(job: Job) -> list[dict[str, Any]]:
    """Fits and measures; returns one record per (method, sparsity, source, view)."""
    checkpoint, device = Checkpoint.open(job.model), torch.device(job.device)
    common = {"seed": job.seed, "code_sha256": code_sha256(), "resident_before_bytes": resident("VmRSS")}
    if job.methods == ("dense",):
        routed = Routed({}, Decoder(checkpoint, device), "full", 0.0, 0.0)
        dense = {name: figures(routed, ids, [])[0] for name, ids in job.texts.items()}
        rows = as_rows(dense, dense, {name: len(ids) for name, ids in job.texts.items()})
        return [common | {"method": "dense", "asked": 0.0} | row for row in rows]
    if job.methods == ("static",):
        return _run_static(job, checkpoint, common)
    work = DensePasses()
    return [
        common | {"asked": sparsity} | row
        for sparsity in job.sparsities
        for row in _run_fit(job, sparsity, checkpoint, device, work)
    ]


def _run_fit(
    job: Job, sparsity: float, checkpoint: Checkpoint, device: torch.device, work: "DensePasses"
) -> Iterator[dict[str, Any]]:
    """Fits for one sparsity and measures every method of the job."""
    # Polish goes on from the local recipe's result, and random routing takes its forecasters.
    name = "local" if {"polish", "random"} & {*job.methods} else job.methods[0]
    options = options_of(name, sparsity, job.seed, job.steps).settled(checkpoint.config)
    try:
        check_reachable(checkpoint, options)
    except UserError as error:
        yield from ({"method": method, "failed": str(error)} for method in job.methods)
        return
    start, before = _now(), work.saved
    with _skipping() if name == "greedy-local" else nullcontext():
        fitted = fit(checkpoint, job.blocks, options, device, work, Team(), work)
    taken = tuple(own + saved for own, saved in zip(_elapsed(start), before, strict=True))
    # Polish last: its peak memory and time come on top of the recipe's.
    for method in sorted(job.methods, key=lambda method: method == "polish"):
        if method == "polish":
            start = _now()
            fitted = polish(fitted, job.blocks, replace(options, polish=job.polish), Work(), Team(), Silent())
            taken = tuple(own + recipe for own, recipe in zip(_elapsed(start), taken, strict=True))
        routed = _random(fitted, sparsity, job.seed) if method == "random" else thresholded(fitted, options)
        # A method's time is its recipe's, and what it takes to set its threshold.
        begin, cost = _now(), {}
        try:
            threshold, slope = deploy(routed, job.blocks.threshold, sparsity)
            cost = _cost(tuple(now - recipe for now, recipe in zip(begin, taken, strict=True)), job.device)
            rows = two_views(routed, threshold, slope, job.texts, sparsity)
        except OutOfReachError:
            rows = [{"failed": f"no threshold saves {sparsity:g} on every text"}]
        yield from (cost | {"recipe_seconds": taken[0], "method": method} | row for row in rows)


class DensePasses(Work, Silent):
    """Keeps what the local recipe learnt of the dense model: it is the same at every sparsity.

    Attributes:
        saved: seconds, wall and processor's, that each further fit is spared, and that count for it all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: tuple[float, ...] = (0.0, 0.0)
        self._results: dict[str, Result] = {}

    def load(self, step: str) -> Result | None:
        return self._results.get(step)

    def save(self, step: str, result: Result) -> None:
        if step.startswith(("forward.", "backward.")):
            self._results[step] = result

    @contextmanager
    def stage(self, name: str, steps: int, tokens: int = 0, done: int = 0) -> Iterator[Callable[[], None]]:
        start, dense = _now(), name in ("forward", "backward") and f"{name}.{steps - 1}" not in self._results
        yield lambda: None
        if dense:
            self.saved = tuple(sum(parts) for parts in zip(self.saved, _elapsed(start), strict=True))


def _run_static(job: Job, checkpoint: Checkpoint, common: dict[str, Any]) -> list[dict[str, Any]]:
    start = _now()
    decoder = Decoder(checkpoint, torch.device(job.device))
    order = drop_order(decoder, job.blocks.fit, max(job.sparsities))
    common |= _cost(start, job.device) | {"order": [f"{layer}.{unit}" for layer, unit in order]}
    measured = measure_drops(drops(decoder, order), order, job.texts, list(job.sparsities))
    return [
        common | {"method": "static", "asked": sparsity} | row for sparsity, rows in measured.items() for row in rows
    ]


def _now() -> tuple[float, ...]:
    return time.monotonic(), time.process_time()


def _elapsed(start: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(now - then for now, then in zip(_now(), start, strict=True))


def _cost(start: tuple[float, ...], device: str) -> dict[str, Any]:
    """Returns time since ``start`` and peak memory. On a busy machine processor time says more than wall time."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    wall, processor = _elapsed(start)
    return {
        "fit_seconds": wall,
        "fit_cpu_seconds": processor,
        "peak_memory_bytes": resident("VmHWM"),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def thresholded(fitted: Fitted, options: Options) -> Routed:
    """Returns a fit as it is measured: where to look for thresholds, by the scores' spread."""
    scores = np.concatenate([values.float().numpy().ravel() for values in fitted.scores.values()])
    low, high = np.quantile(scores, [0.45, 0.55])
    return Routed(fitted.units, fitted.decoder, options.kv_cache, fitted.near[1], max(float(high - low) / 2, 1e-4))


@contextmanager
def _skipping() -> Iterator[None]:
    """Makes forecasters of rank 0 forecast nothing. By themselves they forecast the mean, which is more than skipping."""
    original = Moments.fit

    def fit_nothing(self: Moments, rank: int) -> tuple[Forecaster, Tensor]:
        forecaster, unexplained = original(self, rank)
        return replace(forecaster, bias=torch.zeros_like(forecaster.bias)), unexplained

    Moments.fit = fit_nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Moments.fit = original  # type: ignore[method-assign]


class _Dice(Router):
    """Scores evenly spread over [0, 1), a function of the hidden state that looks like chance. Costs nothing: width 0."""

    def __call__(self, h: Tensor) -> Tensor:
        # Bits of a projection far below what separates any two tokens.
        code = (h.double() @ self.out[0].to(h.device).double()) * 1e7
        return (torch.sin(code) * 1e4).frac().abs().float()


class _Chance(RoutedUnit):
    def to(self, device: torch.device) -> "_Chance":
        moved = RoutedUnit(self.forecaster, self.router).to(device)
        return _Chance(moved.forecaster, self.router)


def _random(fitted: Fitted, sparsity: float, seed: int) -> Routed:
    """Every decision drawn with one probability; the threshold is the probability of approximating."""
    hidden = fitted.decoder.config.hidden_size
    generator, empty = torch.Generator().manual_seed(seed), torch.zeros(0)
    units: dict[tuple[int, str], RoutedUnit] = {
        key: _Chance(
            unit.forecaster,
            _Dice(torch.zeros(0, hidden), empty, torch.randn(1, hidden, generator=generator), torch.zeros(1)),
        )
        for key, unit in fitted.units.items()
    }
    budget = Budget.of(fitted.decoder.config, units)
    probability = (sparsity + budget.overhead_share) / (budget.reachable + budget.overhead_share)
    return Routed(units, fitted.decoder, "full", probability, 0.01)

"""What a calibration will take, said before it begins."""

import time
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint
from ..data import Blocks
from ..decoder import LOGITS
from ..families import layer_parameters, projection_sizes
from .dense import PROBES
from .forecaster import BATCH as FORECASTER_BATCH
from .options import Options
from .refit import ACTIVATION_STEPS
from .router import BATCH as ROUTER_BATCH
from .router import STEPS as ROUTER_STEPS

# Passes over the model that a token of each part makes: forward 1, backward 1 + 2 for each probe, refit 2; the thresholds of
# both measurements; dense and routed.
FIT_PASSES, THRESHOLD_PASSES, TEST_PASSES = 4 + 2 * PROBES, 22, 2
LOGITS_COPIES = 7  # the probes' and what is computed from them
SOLVE_MATRICES = (
    7  # d x d in float64 while a unit is solved: two moments, two covariances, identity, what is factored, factor
)
SPEED_FLOPS = 10**11  # of a product that measures speed, at most, but where few rows would not tell
QUANTISED_BYTES = 0.7  # of an int4 weight: 4 bits, and its share of a block's fp32 scale and zero point


@dataclass(frozen=True)
class Estimate:
    """Rough figures, good to a factor of two.

    Attributes:
        memory: bytes that are resident at the peak, on the device and the host together.
        disk: bytes of hidden states, and of quantised weights if it runs on them, in the work folder.
        seconds: of the local recipe; None for the others, which depend on their steps.
    """

    memory: int
    disk: int
    seconds: float | None

    def sentence(self) -> str:
        time = "" if self.seconds is None else f", {_duration(self.seconds)}"
        return (
            f"Calibration will take about {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.1f} GB of disk{time}."
        )


def estimate(
    checkpoint: Checkpoint, blocks: Blocks, options: Options, device: torch.device, processes: int
) -> Estimate:
    """Estimates from the model's sizes and this device's measured speed at a product of that size."""
    rank, width = options.shape
    config, sizes = checkpoint.config, projection_sizes(checkpoint.config)
    d, layers, units = config.hidden_size, config.num_hidden_layers, len(options.units)
    fit, threshold, test = (getattr(blocks, part).numel() // processes for part in ("fit", "threshold", "test"))
    layer, stored = sum(inputs * outputs for inputs, outputs in sizes.values()), layer_parameters(config)
    head = config.vocab_size * d

    tokens = FIT_PASSES * fit + THRESHOLD_PASSES * threshold + TEST_PASSES * test
    statistics = 2 * 2 * units * fit * 2 * d * d
    routers = units * ROUTER_STEPS * ROUTER_BATCH * 6 * d * width
    forecasters = units * ACTIVATION_STEPS * FORECASTER_BATCH * 12 * d * rank
    flops = layers * (tokens * 2 * layer + statistics + (routers + forecasters) // processes)
    flops += 2 * head * (fit * (1 + 2 * PROBES) + 2 * test)

    tall = 4 * fit * d * units * (2 + PROBES)  # inputs, outputs and gradients of one layer's units
    small = 8 * SOLVE_MATRICES * d * d + 4 * 2 * stored  # weights are there twice while they are read
    logits = 4 * min(blocks.test.shape[1] * config.vocab_size, LOGITS)
    memory = 5 * 10**8 + max(tall + small, 4 * head + tall // 4 + LOGITS_COPIES * logits)
    if options.recipe != "local" or options.polish:
        memory += 4 * (layers * stored + 2 * head) * 2
    states = 4 * d * max(fit * (layers + 1 + 2 * PROBES), threshold * THRESHOLD_PASSES * 2)
    seconds = (
        flops / _speed(d, sizes["up_proj"][1], device) if options.recipe == "local" and not options.polish else None
    )
    kept = 0 if checkpoint.rounding is None else int(QUANTISED_BYTES * layers * stored)
    return Estimate(memory, states + kept, seconds)


def _speed(inner: int, outer: int, device: torch.device) -> float:
    """Returns FLOPs a second of an fp32 product of this size; small ones lose some to everything around them."""
    rows = max(128, min(2048, SPEED_FLOPS // (2 * inner * outer)))
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, outer, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 0.6 * 2 * rows * inner * outer / best


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

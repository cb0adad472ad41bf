"""The published recipe (arXiv 2510.13831): forecasters by gradient descent, then routers trained through the language model.

Published for Llama-3.1-8B, and the defaults here: forecasters by SmoothL1 on the unit's output, 2000 steps, lr 1e-3 on a
cosine, length 128; routers by hard Gumbel-softmax, straight-through, temperature 5 -> 1, LM cross-entropy + 8 |(1 - sparsity)
- mean gate|, 2000 steps of 16 x 2048 tokens, lr 2e-3. (``recipes.py`` passes smaller batches, and rates for them.) Three
things differ. The budget is the share of FLOPs saved, forecaster and router cost subtracted, in place of the plain share of
decisions, so that an asked sparsity means the same for every recipe. Routers have the shape of ``units.py`` and read norm(x).
And at inference the sign of score - threshold decides, not a sample: noisy gates and that rule save different shares, so
callers must set the threshold on held-out text; it is near 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from ...checkpoint import Checkpoint
from ...families import UNITS
from ...flops import Budget, Key
from ...progress import Reporter
from ...units import Forecaster, RoutedUnit, Router, Units
from .gates import Gates
from .model import RoutedModel
from .objective import Objective, train_routed
from .train import Descent, Trace, batches, cut, descend
from .workers import Workers

FORECASTERS = Descent(steps=2000, batch=8, lr=1e-3, length=128)
ROUTERS = Descent(steps=2000, batch=16, lr=2e-3)
PENALTY, TEMPERATURES = 8.0, (5.0, 1.0)
# Greedy routers start at "execute": undecided ones skip half of a model that has nothing to skip with, and collapse.
GREEDY_BIAS = 3.0  # sigmoid(3) = 0.95

Shapes = Mapping[Key, tuple[int, int]]


def uniform_shapes(config: PretrainedConfig, rank: int, width: int, units: tuple[str, ...] = UNITS) -> Shapes:
    """Returns the same (forecaster rank, router width) for every unit of these kinds, by (layer, unit)."""
    return {(layer, unit): (rank, width) for layer in range(config.num_hidden_layers) for unit in units}


def train_paper(
    checkpoint: Checkpoint,
    fit_blocks: Tensor,
    shapes: Shapes,
    *,
    sparsity: float,
    kv_cache: str = "full",
    greedy: bool = False,
    forecasters: Descent = FORECASTERS,
    routers: Descent = ROUTERS,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Reporter | None = None,
) -> tuple[Units, list[Trace]]:
    """Trains forecasters and routers.

    Args:
        checkpoint: the base model, frozen.
        fit_blocks: token blocks ``[blocks, sequence]``, the same on every process.
        shapes: (forecaster rank, router width) of every unit that is to be routed.
        sparsity: the share of FLOPs to save, in the units of ``flops.py``.
        greedy: the baseline without forecasts: approximating skips, and ranks are taken as 0.
        forecasters, routers: how the two stages descend.
        seed: the same seed gives the same result, bit for bit on one CPU process.

    Returns:
        Forecasters and routers (fp32, CPU), and what each stage saw.

    Raises:
        UserError: a loss is NaN or infinite, or the processes cannot share a batch.
    """
    workers = Workers(device)
    reporter = workers.reporter(report)
    if greedy:
        shapes = {key: (0, width) for key, (_, width) in shapes.items()}
    budget = Budget.of_shapes(checkpoint.config, shapes, kv_cache)
    units = _start(checkpoint.config.hidden_size, shapes, GREEDY_BIAS if greedy else 0.0, seed)
    model = RoutedModel(
        checkpoint,
        units,
        kv_cache=kv_cache,
        device=workers.device,
        gradient_checkpointing=gradient_checkpointing,
        shard=workers.shard(),
    )
    traces = []
    if not greedy:
        traces.append(_fit_forecasters(model, fit_blocks, forecasters, seed, workers, reporter))
    first, last = TEMPERATURES  # of the straight-through gradient, linearly over the steps
    trace = train_routed(
        "routers",
        model,
        [(model.trainable("router"), routers.lr)],
        fit_blocks,
        Objective(sparsity=sparsity, penalty=PENALTY),
        lambda progress: Gates("gumbel", temperature=first + (last - first) * progress),
        routers,
        budget=budget,
        seed=seed + 2,
        workers=workers,
        report=reporter,
    )
    return model.to_units(), [*traces, trace]


def _start(hidden: int, shapes: Shapes, bias: float, seed: int) -> Units:
    """Returns forecasters of zero and routers whose every score is ``bias``, their first layers random."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int) -> Tensor:
        return (2 * torch.rand(rows, hidden, generator=generator) - 1) / hidden**0.5

    return {
        (layer, unit): RoutedUnit(
            Forecaster(random(rank), torch.zeros(rank), torch.zeros(hidden, rank), torch.zeros(hidden)),
            Router(random(width), torch.zeros(width), torch.zeros(1, width), torch.full((1,), bias)),
        )
        for (layer, unit), (rank, width) in sorted(shapes.items())
    }


def _fit_forecasters(
    model: RoutedModel, blocks: Tensor, descent: Descent, seed: int, workers: Workers, report: Reporter
) -> Trace:
    """Trains all forecasters to their units' outputs by SmoothL1, on what one dense pass a batch shows of every unit."""
    blocks = cut(blocks, descent.length)
    order = batches(len(blocks), descent, torch.Generator().manual_seed(seed + 1))
    parts = workers.rows(descent.batch, descent.micro_batch)

    def compute(step: int) -> Tensor:
        total = torch.zeros(1, device=workers.device)

        def observer(unit: RoutedUnit, h: Tensor, y: Tensor) -> None:
            loss = F.smooth_l1_loss(unit.forecaster(h), y)
            # Backward at once: no unit's graph outlives its turn.
            (loss / len(parts)).backward()
            total.add_(loss.detach() / len(parts))

        for rows in parts:
            model.observe(blocks[order[step][rows]].to(workers.device), observer)
        return total

    groups, tokens = [(model.trainable("forecaster"), descent.lr)], descent.batch * blocks.shape[1]
    return descend("forecasters", groups, compute, descent, workers, report, tokens)

"""A few end-to-end steps from a calibrated routing, under the deterministic rule that will run: no noise, a fixed threshold."""

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...flops import Budget
from ...progress import Reporter
from ...units import Units
from .gates import Gates
from .model import RoutedModel
from .objective import Objective, train_routed
from .train import Descent, Trace
from .workers import Workers

POLISH = Descent(steps=100, batch=16, lr=1e-3)


def train_polish(
    checkpoint: Checkpoint,
    units: Units,
    fit_blocks: Tensor,
    *,
    threshold: float,
    sparsity: float,
    kv_cache: str = "full",
    descent: Descent = POLISH,
    forecaster_lr: float = 0.0,
    temperature: float = 1.0,
    penalty: float = 8.0,
    distil: bool = False,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Reporter | None = None,
) -> tuple[Units, Trace]:
    """Trains routers, and forecasters if asked, through the whole model.

    Args:
        units: the routing to start from; not changed.
        fit_blocks: token blocks ``[blocks, sequence]``, the same on every process.
        threshold: execute where score > threshold, throughout.
        sparsity: the share of FLOPs that the penalty holds.
        descent: how; ``lr`` is the routers'.
        forecaster_lr: of the forecasters; 0 leaves them as they are.
        temperature: of the straight-through gradient, in units of the scores.
        penalty: weight of |sparsity - share of FLOPs saved|, in nats.
        distil: judge predictions by the dense model's, not by the text; see ``Objective``.

    Returns:
        New units (fp32, CPU), and what the stage saw. Set the threshold again on held-out text.

    Raises:
        UserError: the loss is NaN or infinite, or the processes cannot share a batch.
    """
    workers = Workers(device)
    model = RoutedModel(
        checkpoint,
        units,
        kv_cache=kv_cache,
        device=workers.device,
        gradient_checkpointing=gradient_checkpointing,
        shard=workers.shard(),
    )
    groups = [(model.trainable("router"), descent.lr)]
    if forecaster_lr:
        groups.append((model.trainable("forecaster"), forecaster_lr))
    gates = Gates("straight_through", threshold, temperature, into_stream=not forecaster_lr)
    trace = train_routed(
        "polish",
        model,
        groups,
        fit_blocks,
        Objective(distil, sparsity, penalty),
        lambda _: gates,
        descent,
        budget=Budget.of(checkpoint.config, units, kv_cache),
        seed=seed,
        workers=workers,
        report=workers.reporter(report),
    )
    return model.to_units(), trace

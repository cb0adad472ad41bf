"""The local recipe: statistics, forecasters, routers, threshold, refit, threshold. No end-to-end training."""

from dataclasses import asdict

import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..decoder import Decoder
from ..errors import UserError
from ..evaluate import evaluate
from ..flops import Budget
from ..progress import Reporter, Silent
from ..routing import Routing
from .passes import fit_forecasters, fit_routers, refit_forecasters
from .text import Blocks
from .threshold import Meter


def default_rank(hidden: int) -> int:
    """The published rank is about 100 of 4096; narrower models need relatively more and can afford less."""
    return max(8, min(100, hidden // 16))


def default_router_width(hidden: int) -> int:
    return max(4, min(32, hidden // 24))


def calibrate(
    checkpoint: Checkpoint,
    blocks: Blocks,
    *,
    sparsity: float = 0.4,
    rank: int | None = None,
    router_width: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Reporter | None = None,
) -> Routing:
    """Calibrates forecasters, routers and the sparsity -> threshold curve.

    Args:
        checkpoint: the base model.
        blocks: calibration text.
        sparsity: share of FLOPs to save by default, in [0, 1).
        rank: of the forecasters; 0 forecasts nothing (greedy routing, the baseline).
        router_width: hidden units of the routers.
        seed: of the routers' training and the sampled labels.
        device: where to compute.
        report: shows progress.

    Raises:
        UserError: the rank is too large, the sparsity out of reach, or the model gives a NaN or infinity.
    """
    config, report = checkpoint.config, report or Silent()
    rank = default_rank(config.hidden_size) if rank is None else rank
    router_width = router_width or default_router_width(config.hidden_size)
    if rank > config.hidden_size:
        raise UserError(f"rank {rank} is more than the model's width, {config.hidden_size}: give a smaller --rank")
    budget = Budget.of(config, rank, router_width)
    _check_reachable(budget, sparsity)
    decoder = Decoder(checkpoint, torch.device(device))

    forward = fit_forecasters(decoder, blocks.fit, rank, report)
    units, costs = fit_routers(decoder, forward, router_width, budget, seed, report)
    quantiles = {key: cost.scores for key, cost in costs.items()}
    meter = Meter(decoder, budget, quantiles, blocks.threshold, report)
    if rank and sparsity:
        threshold = meter.near(units, sparsity)
        units = refit_forecasters(decoder, units, blocks.fit, threshold, rank, report)
    curve = meter.curve(units, sparsity)

    dense, routed = evaluate(decoder, units, budget, blocks.test, [curve.at(sparsity)], report)
    metadata = {
        "ir_convert_version": __version__,
        "base_model": checkpoint.name,
        "weights_sha256": checkpoint.weights_sha256,
        "model_type": config.model_type,
        "recipe": "local",
        "rank": rank,
        "router_width": router_width,
        "seed": seed,
        "calibration_sha256": blocks.sha256,
        "calibration_tokens": {name: getattr(blocks, name).numel() for name in ("fit", "threshold", "test")},
        "sparsity": sparsity,
        "threshold": curve.at(sparsity) if sparsity else None,
        "test": {
            "asked": sparsity,
            "perplexity_dense": dense.perplexity,
            "perplexity": routed.perplexity,
            "agreement": routed.agreement,
            "sparsity": routed.sparsity,
            "decisions": routed.decisions,
        },
        "flops": asdict(budget) | {"reachable": budget.reachable, "overhead_share": budget.overhead_share},
        "units": [
            {
                "layer": layer,
                "unit": unit,
                "unexplained_variance": forward.unexplained[layer, unit],
                "cost_nats": costs[layer, unit].mean,
                "approximated": routed.approximated[layer, unit],
            }
            for layer, unit in units
        ],
    }
    return Routing(units, curve, metadata)


def _check_reachable(budget: Budget, sparsity: float) -> None:
    """Raises UserError where not even approximating everything would save so much."""
    if sparsity > budget.reachable:
        raise UserError(
            f"sparsity {sparsity:g} is out of reach for this model: approximating every unit saves {budget.reachable:.3f} "
            "of the FLOPs (keys and values stay computed, forecasters and routers cost their share)"
        )

"""Calibration: text and a base model in, a routing out."""

import math
import resource
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..curve import within_reach
from ..data import Blocks
from ..decoder import Decoder
from ..errors import UserError
from ..evaluate import Measured, Quality, measure
from ..progress import Reporter, Silent
from ..routing import Curve, Routing
from ..settings import settings
from ..stream import Team, Work
from .fitted import Fitted
from .options import Options
from .recipes import fit
from .threshold import Meter


def calibrate(
    checkpoint: Checkpoint,
    blocks: Blocks,
    options: Options | None = None,
    *,
    device: torch.device | str = "cpu",
    report: Reporter | None = None,
    work: Work | None = None,
    team: Team | None = None,
) -> Routing:
    """Calibrates forecasters, routers and the sparsity -> threshold curve.

    Args:
        checkpoint: the base model; a quantised view of it calibrates for a quantised model.
        blocks: calibration text.
        options: what to do; the defaults are the tables' best for the time it takes.
        device: where to compute.
        report: shows progress.
        work: keeps what is done, so that an interrupted run goes on there.
        team: the processes that share the work.

    Raises:
        UserError: an option is not possible, the sparsity out of reach, or the model gives a NaN or infinity.
    """
    start = time.monotonic()
    options = (options or Options()).settled(checkpoint.config)
    check_reachable(checkpoint, options)
    report, work, team = report or Silent(), work or Work(), team or Team()
    _check_shared(blocks, team)
    _check_tokens(blocks, checkpoint)
    fitted = fit(checkpoint, blocks, options, torch.device(device), work, team, report)
    fit_seconds = time.monotonic() - start
    decoder = fitted.decoder
    meter = Meter(decoder, blocks.threshold, options.kv_cache, work, team, report)
    curve = meter.curve(fitted.units, fitted.scores, options.sparsity, fitted.near)
    threshold = curve.at(options.sparsity)
    base = Decoder(checkpoint, decoder.device) if fitted.lora else None
    measured = measure(decoder, fitted.units, blocks.test, [threshold], options.kv_cache, report, work, team, base)
    metadata = {
        "ir_convert_version": __version__,
        "base_model": checkpoint.public_name,
        "weights_sha256": checkpoint.weights_sha256,
        "model_type": checkpoint.config.model_type,
        "config": settings(checkpoint.config),
        **options.as_dict(),
        "calibration_sha256": blocks.sha256,
        "calibration_tokens": {name: getattr(blocks, name).numel() for name in ("fit", "threshold", "test")},
        "calibration_mixture": blocks.mixture(),
        "fit_seconds": round(fit_seconds, 1),
        "calibration_seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak_memory(),
        "threshold": threshold if math.isfinite(threshold) else None,
        "curve_standard_error": _errors(curve, meter),
        **_figures(measured, blocks, options, fitted),
    }
    if checkpoint.rounding is not None:
        metadata["quantised_units"] = checkpoint.rounding.facts()
    return Routing(fitted.units, curve, metadata, fitted.lora)


def check_reachable(checkpoint: Checkpoint, options: Options) -> None:
    """Raises UserError where not even approximating everything would save so much; ``options`` are settled ones."""
    reachable = options.budget(checkpoint.config).reachable
    if options.sparsity > reachable:
        raise UserError(
            f"sparsity {options.sparsity:g} is out of reach for this model: approximating every routed unit saves "
            f"{max(0, within_reach(reachable)):.3f} of the FLOPs (what always runs, forecasters and routers cost their share)"
        )


def _check_shared(blocks: Blocks, team: Team) -> None:
    for part in ("fit", "threshold", "test"):
        if (count := len(getattr(blocks, part))) < team.size:
            raise UserError(
                f"{team.size} processes cannot share {count} blocks ({part}): give more --tokens, a smaller --block-size, "
                "or fewer processes"
            )


def _check_tokens(blocks: Blocks, checkpoint: Checkpoint) -> None:
    largest = max(int(getattr(blocks, part).max()) for part in ("fit", "threshold", "test"))
    if largest >= (rows := checkpoint.config.vocab_size):
        raise UserError(
            f"the calibration text holds token {largest}, the model's embedding has 0 to {rows - 1}: its tokenizer knows tokens "
            "that it has no rows for; resize the embedding, or take them out of the text"
        )


def peak_memory() -> int:
    """Returns the most resident memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _errors(curve: Curve, meter: Meter) -> list[float | None]:
    return [_or_none(meter.errors[threshold]) for threshold in curve.threshold]


def _or_none(value: float) -> float | None:
    """JSON has no infinity: the error of a single block's mean is none."""
    return value if math.isfinite(value) else None


def _figures(measured: Measured, blocks: Blocks, options: Options, fitted: Fitted) -> dict[str, Any]:
    dense, routed = measured.quality(0), measured.quality(1)
    budget = measured.budget

    def row(dense: Quality, routed: Quality) -> dict[str, float | None]:
        return {
            "perplexity_dense": dense.perplexity,
            "perplexity": routed.perplexity,
            "kl": routed.kl,
            "agreement": routed.agreement,
            "sparsity": routed.sparsity,
            "sparsity_standard_error": _or_none(routed.sparsity_error),
            "decisions": routed.decisions,
        }

    by_source = {
        name: row(measured.quality(0, mask), measured.quality(1, mask))
        for index, name in enumerate(blocks.names)
        if (mask := blocks.sources["test"] == index).any()
    }
    return {
        "test": {"asked": options.sparsity, **row(dense, routed), "sources": by_source},
        "flops": {
            **{name: value for name, value in asdict(budget).items() if name != "overhead"},
            "reachable": budget.reachable,
            "overhead_share": budget.overhead_share,
        },
        "per_unit": [
            {"layer": layer, "unit": unit, "approximated": routed.approximated[layer, unit]}
            | fitted.notes.get((layer, unit), {})
            for layer, unit in fitted.units
        ],
    }

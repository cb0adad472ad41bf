"""What a model file says about itself."""

import math
from collections.abc import Callable
from typing import Any

import ir_convert
from ir_convert.checkpoint import Checkpoint
from ir_convert.families import UNITS
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit

from .rotary import long_text_bound


def metadata(checkpoint: Checkpoint, routing: Routing) -> dict[str, Any]:
    """Returns what the model file says about itself (JSON, property ``ir_convert``)."""
    threshold = routing.threshold

    def sizes(size: Callable[[RoutedUnit], int]) -> dict[str, list[int | None]]:
        """By unit, then by layer; null for a unit that is not routed."""
        known = {key: size(unit) for key, unit in routing.units.items()}
        layers = range(checkpoint.config.num_hidden_layers)
        return {unit: [known.get((layer, unit)) for layer in layers] for unit in UNITS}

    return {
        "version": ir_convert.__version__,
        "base_model": routing.metadata.get("base_model", checkpoint.public_name),
        "weights_sha256": routing.metadata.get("weights_sha256"),
        "family": checkpoint.config.model_type,
        "recipe": routing.metadata.get("recipe"),
        "rank": sizes(lambda unit: unit.forecaster.rank),
        "router_width": sizes(lambda unit: unit.router.width),
        "kv_cache": routing.kv_cache,
        "long_text_bound": long_text_bound(checkpoint.config),
        "sparsity": routing.sparsity,
        "threshold": threshold if math.isfinite(threshold) else str(threshold),  # JSON has no infinity
        "sparsity_curve": {"sparsity": routing.curve.sparsity, "threshold": routing.curve.threshold},
    }

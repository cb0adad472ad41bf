"""Token blocks through the model, layer by layer: one layer's weights in memory at a time, resumable, shared by processes."""

from .routed import Approximated, chunks, routed_unit, run_routed
from .sweep import by_layer, embed, named, require_finite, sweep
from .team import Sample, Team
from .work import Result, States, Work

__all__ = [
    "Approximated",
    "Result",
    "Sample",
    "States",
    "Team",
    "Work",
    "by_layer",
    "chunks",
    "embed",
    "named",
    "require_finite",
    "routed_unit",
    "run_routed",
    "sweep",
]

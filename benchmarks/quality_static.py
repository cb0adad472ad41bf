"""Static dropping: the same units left out for every token.

Which: one at a time, always the one whose loss adds least loss per FLOP saved to the model as it is by then, measured on
calibration text (as SLEB does with whole layers; stronger than ranking all units once by block influence). Attention that
is never run needs no keys and values, so dropping it saves all four projections.
"""

import math

import torch
from quality_measure import Figures, Routed, as_rows, figures, interpolate
from torch.nn import functional as F

from ir_convert.decoder import Decoder
from ir_convert.families import UNITS
from ir_convert.flops import Budget, Key
from ir_convert.units import Forecaster, RoutedUnit, Router

SEARCH_BLOCKS = 8


@torch.no_grad()
def drop_order(decoder: Decoder, ids: torch.Tensor, upto: float) -> list[Key]:
    """Returns units in the order to drop them, until at least ``upto`` of the FLOPs is saved."""
    budget = Budget.of_shapes(decoder.config, {}, "strict")
    ids = ids[torch.linspace(0, len(ids) - 1, min(SEARCH_BLOCKS, len(ids))).long()]
    dropped: list[Key] = []
    while sum(budget.share(unit) for _, unit in dropped) < upto and len(dropped) < len(UNITS) * budget.layers:
        losses = _losses_without(decoder, ids, dropped)
        base = losses.pop(None)
        dropped.append(min(losses, key=lambda key: (losses[key] - base) / budget.share(key[1])))
    return dropped


def _losses_without(decoder: Decoder, ids: torch.Tensor, dropped: list[Key]) -> dict[Key | None, float]:
    """Returns the loss with ``dropped`` left out (None), and with one more unit left out, for each that is left."""
    streams: dict[Key | None, torch.Tensor] = {None: decoder.embed(ids).to(decoder.device)}
    for index, layer in decoder.layers():
        for unit in UNITS:
            if (index, unit) in dropped:
                continue
            before = streams[None]
            for key, x in streams.items():
                streams[key] = x + layer.contribution(unit, x)
            streams[index, unit] = before
    head, labels = decoder.head(), ids[:, 1:].to(decoder.device)
    return {
        key: sum(
            float(F.cross_entropy(head(row)[:-1], label)) for row, label in zip(x, labels, strict=True)
        ) / len(ids)
        for key, x in streams.items()
    }  # fmt: skip


def drops(decoder: Decoder, order: list[Key]) -> Routed:
    """Returns a routing that leaves out the first k units of ``order``, for all tokens, at threshold k - 0.5."""
    hidden, empty = decoder.config.hidden_size, torch.zeros(0)
    units = {
        key: RoutedUnit(
            Forecaster(torch.zeros(0, hidden), empty, torch.zeros(hidden, 0), torch.zeros(hidden)),
            Router(torch.zeros(0, hidden), empty, torch.zeros(1, 0), torch.tensor([float(place)])),
        )
        for place, key in enumerate(order)
    }
    return Routed(dict(sorted(units.items())), decoder, "strict", math.nan, math.nan)


def measure_drops(routed: Routed, order: list[Key], texts: dict[str, torch.Tensor], asked: list[float]) -> dict:
    """Returns rows by asked sparsity: figures of the two neighbouring counts, interpolated. Both views are the same."""
    budget = Budget.of_shapes(routed.decoder.config, {}, "strict")
    saved = [sum(budget.share(unit) for _, unit in order[:count]) for count in range(len(order) + 1)]
    places = {sparsity: max(k for k, value in enumerate(saved) if value <= sparsity + 1e-9) for sparsity in asked}
    counts = sorted({min(k + more, len(order)) for k in places.values() for more in (0, 1)})
    by_text: dict[str, list[Figures]] = {
        name: figures(routed, ids, [count - 0.5 for count in counts])[1:] for name, ids in texts.items()
    }
    weights = {name: len(ids) for name, ids in texts.items()}
    result = {}
    for sparsity in asked:
        exact = {name: interpolate(rows, sparsity) for name, rows in by_text.items()}
        result[sparsity] = as_rows(exact, exact, weights)
    return result

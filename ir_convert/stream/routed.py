"""Token blocks through the routed model, at several thresholds in one pass over the layers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..families import UNITS
from ..progress import Reporter, Silent
from ..units import RoutedUnit, Units, merge
from .sweep import sweep
from .work import Result, States, Work

CHUNK_TOKENS = 8192

# The share of tokens approximated, by (layer, unit): ``[thresholds, blocks]``.
Approximated = dict[tuple[int, str], Tensor]


def chunks(count: int, block: int) -> Iterator[slice]:
    """Yields slices over blocks, each of about ``CHUNK_TOKENS`` tokens."""
    step = max(1, CHUNK_TOKENS // block)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def run_routed(
    decoder: Decoder,
    units: Units,
    ids: Tensor,
    thresholds: list[float],
    kv_cache: str = "full",
    report: Reporter | None = None,
    name: str = "routed",
    work: Work | None = None,
) -> tuple[States, Approximated]:
    """Runs blocks through the routed model.

    Args:
        decoder: the base model.
        units: forecaster and router by (layer, unit).
        ids: token blocks ``[blocks, sequence]``.
        thresholds: execute where score > threshold.
        kv_cache: ``full`` or ``strict``.
        report: shows progress under ``name``.
        work: keeps what is done.

    Returns:
        The last layer's output ``[blocks, thresholds, sequence, hidden]``, and the share of tokens approximated in each
        routed unit ``[thresholds, blocks]``.
    """
    units = {key: unit.to(decoder.device) for key, unit in units.items()}
    shape = (len(ids), len(thresholds), ids.shape[1], decoder.config.hidden_size)

    @torch.no_grad()
    def start(target: States) -> None:
        target[slice(0, len(ids))] = decoder.embed(ids).unsqueeze(1).expand(shape)

    @torch.no_grad()
    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        result = {unit: torch.zeros(len(thresholds), len(ids)) for unit in UNITS if (index, unit) in units}
        for rows in chunks(len(ids), len(thresholds) * ids.shape[1]):
            streams = source[rows]
            for k, threshold in enumerate(thresholds):
                x = streams[:, k].to(decoder.device)
                for unit in UNITS:
                    x, executed = routed_unit(layer, unit, units.get((index, unit)), x, threshold, kv_cache)
                    if executed is not None:
                        result[unit][k, rows] = (~executed).float().mean(1).cpu()
                streams[:, k] = x.cpu()
            target[rows] = streams
        return result or {"done": torch.ones(1)}

    tokens = len(thresholds) * ids.numel()
    results, states = sweep(decoder, work or Work(), name, report or Silent(), shape, start, step, tokens=tokens)
    return states[-1], {key: results[key[0]][key[1]] for key in units}


def routed_unit(
    layer: Layer, unit: str, routed: RoutedUnit | None, x: Tensor, threshold: float, kv_cache: str = "full"
) -> tuple[Tensor, Tensor | None]:
    """Runs one unit on ``x[batch, sequence, hidden]``; returns x + its output, and where it executed, if it is routed."""
    h = layer.norm(unit, x)
    if routed is None:
        return x + layer.contribution(unit, x), None
    execute = routed.execute(h, threshold)
    if unit == "attention":
        output = layer.contribution(unit, x, execute if kv_cache == "strict" else None)
        return x + merge(execute, output, routed.forecaster(h)), execute
    # An MLP sees one token at a time: those that skip it need not be there.
    added = routed.forecaster(h)
    if execute.any():
        added[execute] = layer.contribution(unit, x[execute].unsqueeze(0)).squeeze(0)
    return x + added, execute

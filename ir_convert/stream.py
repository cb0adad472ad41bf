"""Token blocks through the whole model, layer by layer, dense or routed: one layer's weights in memory at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .decoder import Decoder, Layer
from .families import UNITS
from .progress import Reporter
from .routing import Units
from .units import merge

CHUNK_TOKENS = 8192

# The share of tokens approximated, by (layer, unit); one entry a threshold.
Approximated = dict[tuple[int, str], Tensor]


def chunks(count: int, block: int) -> Iterator[slice]:
    """Yields slices over blocks, each of about ``CHUNK_TOKENS`` tokens."""
    step = max(1, CHUNK_TOKENS // block)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def run_routed(
    decoder: Decoder, units: Units, ids: Tensor, thresholds: list[float], report: Reporter, name: str
) -> tuple[Tensor, Approximated]:
    """Runs blocks through the routed model at several thresholds at once.

    Args:
        decoder: the base model.
        units: forecaster and router by (layer, unit).
        ids: token blocks ``[blocks, sequence]``.
        thresholds: execute where score > threshold.
        report: shows progress under ``name``.

    Returns:
        The last layer's output ``[thresholds, blocks, sequence, hidden]`` on the CPU, and the share of tokens approximated
        in each unit ``[thresholds]``.
    """
    x = decoder.embed(ids).repeat(len(thresholds), 1, 1, 1)
    approximated: Approximated = {}
    with torch.no_grad(), report.stage(name, decoder.config.num_hidden_layers, x[..., 0].numel()) as advance:
        for index, layer in decoder.layers():
            for unit in UNITS:
                approximated[index, unit] = torch.zeros(len(thresholds), dtype=torch.float64)
            for k, threshold in enumerate(thresholds):
                for rows in chunks(len(ids), ids.shape[1]):
                    out, executed = routed_layer(layer, index, units, x[k, rows].to(decoder.device), threshold)
                    x[k, rows] = out.cpu()
                    for unit in UNITS:
                        approximated[index, unit][k] += (~executed[unit]).sum().item() / ids.numel()
            advance()
    return x, approximated


def routed_layer(
    layer: Layer, index: int, units: Units, x: Tensor, threshold: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs one routed layer on ``x[batch, sequence, hidden]``; returns its output and where each unit executed."""
    executed = {}
    for unit in UNITS:
        routed = units[index, unit]
        h = layer.norm(unit, x)
        executed[unit] = routed.execute(h, threshold)
        x = x + merge(executed[unit], layer.run(unit, h), routed.forecaster(h))
    return x, executed

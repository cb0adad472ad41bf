"""One pass over the layers, in either direction, that can stop after any layer and go on there."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..errors import UserError
from ..progress import Reporter
from .work import Result, States, Work

# Runs one layer: reads the states before it, writes those after it, returns what it learnt.
Step = Callable[[int, Layer, States, States], Result]


def sweep(
    decoder: Decoder,
    work: Work,
    name: str,
    report: Reporter,
    shape: tuple[int, ...],
    start: Callable[[States], None],
    step: Step,
    *,
    tokens: int,
    backwards: bool = False,
    keep: bool = False,
) -> tuple[list[Result], list[States]]:
    """Runs ``step`` on every layer.

    Args:
        name: of the pass, in the work folder and on the screen.
        shape: of the hidden states that go from layer to layer.
        start: fills the first of them.
        tokens: that each step covers, for the progress bar.
        backwards: from the last layer to the first.
        keep: keep the hidden states of every layer, not the last alone.

    Returns:
        What each step gave, on the CPU and in the order of layers, and the hidden states: one more than layers with ``keep``, else the last.
    """
    count = decoder.config.num_hidden_layers
    order = list(reversed(range(count))) if backwards else list(range(count))
    results: list[Result] = []
    while len(results) < count and (done := work.load(f"{name}.{len(results)}")) is not None:
        results.append(done)

    def states(place: int) -> States:
        return work.states(f"{name}.{place}", shape)

    kept = [states(place) for place in range(len(results) + 1)] if keep else [states(len(results))]
    with report.stage(name, count, tokens, len(results)) as advance:
        if not results:
            start(kept[-1])
            kept[-1].finish()
        for place in range(len(results), count):
            target = states(place + 1)
            result = step(order[place], decoder.layer(order[place]), kept[-1], target)
            target.finish()
            results.append({key: tensor.detach().cpu() for key, tensor in result.items()})
            work.save(f"{name}.{place}", results[-1])
            if not keep:
                kept.pop().discard()
            kept.append(target)
            advance()
    return results[::-1] if backwards else results, kept


def require_finite(x: Tensor, layer: int, unit: str, rows: slice, what: str = "hidden states") -> None:
    """Raises UserError where ``x[blocks, ...]`` holds a NaN or infinity."""
    if not x.isfinite().all():
        bad = int((~x.isfinite().flatten(1).all(1)).nonzero()[0]) + rows.start
        raise UserError(
            f"layer {layer}, {unit}: NaN or infinity in the {what}, first in calibration block {bad}: "
            "the weights may be damaged"
        )


def by_layer(results: list[Result], units: tuple[str, ...]) -> dict[tuple[int, str], Result]:
    """Parts what each layer's step gave by unit: names begin with ``{unit}.``"""
    return {
        (layer, unit): {
            name.removeprefix(f"{unit}."): tensor for name, tensor in result.items() if name.startswith(f"{unit}.")
        }
        for layer, result in enumerate(results)
        for unit in units
    }


def named(unit: str, tensors: Result) -> Result:
    """The inverse of ``by_layer`` for one unit."""
    return {f"{unit}.{name}": tensor for name, tensor in tensors.items()}


def embed(decoder: Decoder, ids: Tensor, target: States) -> None:
    """Fills hidden states ``[blocks, sequence, hidden]`` with the embeddings of ``ids[blocks, sequence]``."""
    with torch.no_grad():
        target[slice(0, len(ids))] = decoder.embed(ids)

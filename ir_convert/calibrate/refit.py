"""One routed pass over the fit blocks: forecasters are fitted again to the tokens they serve, as earlier ones change the stream."""

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..families import UNITS
from ..flops import Key
from ..progress import Reporter
from ..stream import Result, States, Team, Work, by_layer, chunks, embed, named, require_finite, sweep
from ..units import RoutedUnit, Units, merge
from .forecaster import Moments, train_activation
from .options import Options

EXECUTED_WEIGHT = 0.3
ACTIVATION_STEPS = 300


def refit(
    decoder: Decoder,
    units: Units,
    ranks: dict[Key, int],
    ids: Tensor,
    count: int,
    threshold: float,
    options: Options,
    work: Work,
    team: Team,
    report: Reporter,
    activation_steps: int | None = None,
) -> Units:
    """Returns the units with new forecasters.

    Tokens that the router approximates weigh 1, the others 0.3: the forecaster serves the former, the latter keep it from
    overfitting and let the threshold move later.

    Args:
        ids: this process's blocks ``[blocks, sequence]``, of ``count`` over all processes.
    """
    shape = (*ids.shape, decoder.config.hidden_size)
    sample = team.sample(count, ids.shape[1], decoder.device)
    steps = ACTIVATION_STEPS if activation_steps is None else activation_steps
    units = {key: unit.to(decoder.device) for key, unit in units.items()}

    @torch.no_grad()
    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        result: Result = {}
        before = source
        for unit in UNITS:
            routed = units.get((index, unit))
            inputs, outputs, executes, weights = [], [], [], []
            moments = Moments(shape[-1], shape[-1], decoder.device)
            for rows in chunks(*ids.shape):
                x = before[rows].to(decoder.device)
                h = layer.norm(unit, x)
                execute = (
                    routed.execute(h, threshold)
                    if routed
                    else torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
                )
                strict = routed and unit == "attention" and options.kv_cache == "strict"
                y = layer.contribution(unit, x, execute if strict else None)
                require_finite(y, index, unit, rows)
                if routed:
                    weights.append(torch.where(execute, EXECUTED_WEIGHT, 1.0).flatten())
                    moments.add(h, y, weights[-1])
                    inputs.append(h.flatten(0, 1))
                    outputs.append(y.flatten(0, 1))
                    executes.append(execute.flatten())
                else:
                    target[rows] = (x + y).cpu()
            if not routed:
                before = target
                continue
            h, y, execute, weight = (torch.cat(parts) for parts in (inputs, outputs, executes, weights))
            del inputs, outputs
            forecaster, _ = moments.share(team).fit(ranks[index, unit])
            with torch.enable_grad():
                seed = options.seed + 1000 * index + len(unit)
                forecaster = train_activation(forecaster, h, y, weight, steps, seed, sample)
            result |= named(unit, RoutedUnit(forecaster, routed.router).tensors())
            for rows in chunks(*ids.shape):
                flat = slice(rows.start * ids.shape[1], rows.stop * ids.shape[1])
                change = merge(execute[flat], y[flat], forecaster(h[flat])).cpu()
                target[rows] = before[rows] + change.view(-1, *shape[1:])
            before = target
        return result or {"done": torch.ones(1)}

    results, states = sweep(
        decoder, work, "refit", report, shape, lambda x: embed(decoder, ids, x), step, tokens=ids.numel()
    )
    states[-1].discard()
    return {key: RoutedUnit.from_tensors(t) for key, t in by_layer(results, options.units).items() if key in units}

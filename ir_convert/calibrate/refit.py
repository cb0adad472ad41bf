"""One routed pass over the fit blocks: forecasters are fitted again to the tokens they serve, as earlier ones change the stream."""

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..families import UNITS
from ..flops import Key
from ..progress import Reporter
from ..stream import Result, States, Team, Work, by_layer, chunks, named, require_finite, sweep
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

    A forecaster is fitted to what leads a token that it serves back to where the dense model has it after the unit: to the
    unit's own output and, as far as the hidden state tells, to what earlier approximations left out. (So AdaRound, Nagel et
    al. 2020, rounds a layer: inputs as they will be, outputs as they were.) Tokens that the router executes count with the
    unit's output alone, and 0.3 times: they keep the forecaster from overfitting and let the threshold move later.

    Args:
        ids: this process's blocks ``[blocks, sequence]``, of ``count`` over all processes.
    """
    shape = (len(ids), 2, ids.shape[1], decoder.config.hidden_size)  # the routed stream, and the dense one
    sample = team.sample(count, ids.shape[1], decoder.device)
    steps = ACTIVATION_STEPS if activation_steps is None else activation_steps
    units = {key: unit.to(decoder.device) for key, unit in units.items()}

    @torch.no_grad()
    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        result: Result = {}
        before = source
        for unit in UNITS:
            routed = units.get((index, unit))
            inputs, outputs, goals, executes, weights = [], [], [], [], []
            moments = Moments(shape[-1], shape[-1], decoder.device)
            for rows in chunks(len(ids), 2 * ids.shape[1]):
                x, dense = before[rows].to(decoder.device).unbind(1)
                h = layer.norm(unit, x)
                execute = (
                    routed.execute(h, threshold)
                    if routed
                    else torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
                )
                strict = routed and unit == "attention" and options.kv_cache == "strict"
                y = layer.contribution(unit, x, execute if strict else None)
                require_finite(y, index, unit, rows)
                dense = dense + layer.contribution(unit, dense)
                if routed:
                    goal = merge(execute, y, dense - x)
                    weights.append(torch.where(execute, EXECUTED_WEIGHT, 1.0).flatten())
                    moments.add(h, goal, weights[-1])
                    inputs.append(h.flatten(0, 1))
                    outputs.append(y.flatten(0, 1))
                    goals.append(goal.flatten(0, 1))
                    executes.append(execute.flatten())
                else:
                    x = x + y
                target[rows] = torch.stack([x, dense], 1).cpu()
            before = target
            if not routed:
                continue
            h, y, goal, execute, weight = (torch.cat(parts) for parts in (inputs, outputs, goals, executes, weights))
            del inputs, outputs, goals
            forecaster, _ = moments.share(team).fit(ranks[index, unit])
            with torch.enable_grad():
                seed = options.seed + 1000 * index + len(unit)
                forecaster = train_activation(forecaster, h, goal, weight, steps, seed, sample)
            result |= named(unit, RoutedUnit(forecaster, routed.router).tensors())
            for rows in chunks(len(ids), 2 * ids.shape[1]):
                flat = slice(rows.start * ids.shape[1], rows.stop * ids.shape[1])
                both = target[rows]
                both[:, 0] += merge(execute[flat], y[flat], forecaster(h[flat])).cpu().view_as(both[:, 0])
                target[rows] = both
        return result or {"done": torch.ones(1)}

    def start(target: States) -> None:
        target[slice(0, len(ids))] = decoder.embed(ids).unsqueeze(1).expand(shape)

    results, states = sweep(decoder, work, "refit", report, shape, start, step, tokens=ids.numel())
    states[-1].discard()
    return {key: RoutedUnit.from_tensors(t) for key, t in by_layer(results, options.units).items() if key in units}

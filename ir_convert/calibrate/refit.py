"""One routed pass over the fit blocks: forecasters are fitted again to the tokens they serve, as earlier ones change the stream."""

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..families import UNITS
from ..flops import Key
from ..progress import Reporter
from ..stream import Result, Sample, States, Team, Work, by_layer, chunks, named, require_finite, sweep
from ..units import RoutedUnit, Units, merge
from .forecaster import Moments, train_activation
from .options import Options

EXECUTED_WEIGHT = 0.3
ACTIVATION_STEPS = 300
# A token is led back no further than this, in units of the root mean square of the unit's outputs: a token whose huge
# activation was left out (large models have such) would else be all that later forecasters are fitted to.
FURTHEST = 10.0
# A forecast is made smaller by so much of what it leaves unexplained: a whole one is closest to the unit, but loses more of the
# predictions, on any text; one that is nearly exact stays as it is.
SHRINK = 0.3


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
    Each forecaster is shrunk in the end, by ``SHRINK``; later ones are fitted to what the whole one leaves.

    Args:
        ids: this process's blocks ``[blocks, sequence]``, of ``count`` over all processes.
    """
    blocks, sequence = ids.shape
    shape = (blocks, 2, sequence, decoder.config.hidden_size)  # the routed stream, and the dense one
    sample = team.sample(count, sequence, decoder.device)
    steps = ACTIVATION_STEPS if activation_steps is None else activation_steps
    units = {key: unit.to(decoder.device) for key, unit in units.items()}

    @torch.no_grad()
    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        result: Result = {}
        for unit in UNITS:
            before = source if unit == UNITS[0] else target
            if (routed := units.get((index, unit))) is None:
                for rows in chunks(blocks, 2 * sequence):
                    x, dense = before[rows].to(decoder.device).unbind(1)
                    y = layer.contribution(unit, x)
                    require_finite(y, index, unit, rows)
                    target[rows] = torch.stack([x + y, dense + layer.contribution(unit, dense)], 1).cpu()
                continue
            h, y, goal, execute = _meet(index, layer, unit, routed, threshold, before, target, options, sample)
            weight = torch.where(execute, EXECUTED_WEIGHT, 1.0)
            forecaster, _ = Moments.of(h, goal, weight).share(team).fit(ranks[index, unit])
            with torch.enable_grad():
                seed = options.seed + 1000 * index + len(unit)
                forecaster = train_activation(forecaster, h, goal, weight, steps, seed, sample)
            left, whole = torch.zeros(2, dtype=torch.float64, device=h.device).unbind()
            for rows in chunks(blocks, 2 * sequence):
                flat = slice(rows.start * sequence, rows.stop * sequence)
                forecast = forecaster(h[flat])
                left += weight[flat].double() @ (goal[flat] - forecast).square().sum(1).double()
                whole += weight[flat].double() @ goal[flat].square().sum(1).double()
                change = merge(execute[flat], y[flat], forecast).cpu()
                streams = target[rows]
                streams[:, 0] += change.view_as(streams[:, 0])
                target[rows] = streams
            team.sum([left, whole])
            kept = 1 - SHRINK * float((left / whole.clamp(min=1e-30)).clamp(max=1.0))
            result |= named(unit, RoutedUnit(forecaster.scaled(kept), routed.router).tensors())
        return result or {"done": torch.ones(1)}

    def start(target: States) -> None:
        target[slice(0, blocks)] = decoder.embed(ids).unsqueeze(1).expand(shape)

    results, states = sweep(decoder, work, "refit", report, shape, start, step, tokens=ids.numel())
    states[-1].discard()
    return {key: RoutedUnit.from_tensors(t) for key, t in by_layer(results, options.units).items() if key in units}


def _meet(
    index: int,
    layer: Layer,
    unit: str,
    routed: RoutedUnit,
    threshold: float,
    before: States,
    target: States,
    options: Options,
    sample: Sample,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs a unit on both streams; ``target`` gets the dense one after it, and the routed one as it was before.

    Returns:
        Of the routed stream, inputs h, outputs y, and what the forecaster is fitted to, ``[tokens, hidden]``; and which tokens
        execute, ``[tokens]``.
    """
    blocks, _, sequence, hidden = before.shape
    device = routed.router.hidden.device
    h, y, goal = torch.empty(3, blocks * sequence, hidden, device=device)
    execute = torch.empty(blocks * sequence, dtype=torch.bool, device=device)
    for rows in chunks(blocks, 2 * sequence):
        x, dense = before[rows].to(device).unbind(1)
        seen = layer.norm(unit, x)
        decided = routed.execute(seen, threshold)
        strict = unit == "attention" and options.kv_cache == "strict"
        output = layer.contribution(unit, x, decided if strict else None)
        require_finite(output, index, unit, rows)
        dense = dense + layer.contribution(unit, dense)
        target[rows] = torch.stack([x, dense], 1).cpu()
        # From where the routed stream would be after the unit, if it executed, to where the dense one is.
        drift = merge(decided, torch.zeros_like(x), dense - x - output)
        flat = slice(rows.start * sequence, rows.stop * sequence)
        for whole, part in zip((h, y, goal, execute), (seen, output, drift, decided), strict=True):
            whole[flat] = part.flatten(0, 1)
    limit = FURTHEST * sample.mean(y, lambda part: part.square().sum(1)).sqrt()
    goal *= (limit / goal.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    goal += y
    return h, y, goal, execute

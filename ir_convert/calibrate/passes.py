"""The passes over the fit blocks: forecasters forward, routers backward, forecasters again under routing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import Decoder
from ..errors import UserError
from ..families import UNITS
from ..flops import Budget
from ..progress import Reporter
from ..routing import Units
from ..stream import chunks
from ..units import Forecaster, RoutedUnit, Router, merge
from .forecaster import Moments
from .router import fit_router
from .threshold import score_quantiles

EXECUTED_WEIGHT = 0.3


@dataclass
class Cost:
    """What approximating a unit costs.

    Attributes:
        mean: estimated loss, in nats a token, of approximating this unit everywhere.
        scores: quantiles of the router's scores.
    """

    mean: float
    scores: Tensor


Costs = dict[tuple[int, str], Cost]


@dataclass
class Forward:
    """What the dense forward pass leaves.

    Attributes:
        inputs: every layer's input ``[layers + 1][blocks, sequence, hidden]``, the last layer's output at the end.
        forecasters: by (layer, unit).
        unexplained: the share of each unit's output variance that its forecaster leaves unexplained.
    """

    inputs: list[Tensor]
    forecasters: dict[tuple[int, str], Forecaster]
    unexplained: dict[tuple[int, str], float]


def fit_forecasters(decoder: Decoder, ids: Tensor, rank: int, report: Reporter) -> Forward:
    """One dense forward pass over ``ids[blocks, sequence]``; each unit's forecaster is fitted as its layer passes."""
    x = decoder.embed(ids)
    result = Forward([x], {}, {})
    with torch.no_grad(), report.stage("forecasters", decoder.config.num_hidden_layers, ids.numel()) as advance:
        for index, layer in decoder.layers():
            moments = {unit: Moments(x.shape[-1], decoder.device) for unit in UNITS}
            out = torch.empty_like(x)
            for rows in chunks(*ids.shape):
                stream = x[rows].to(decoder.device)
                for unit in UNITS:
                    h = layer.norm(unit, stream)
                    y = layer.run(unit, h)
                    moments[unit].add(h, y)
                    stream = stream + y
                _require_finite(stream, index, rows)
                out[rows] = stream.cpu()
            for unit in UNITS:
                result.forecasters[index, unit], result.unexplained[index, unit] = moments[unit].fit(rank)
            x = out
            result.inputs.append(x)
            advance()
    return result


def fit_routers(
    decoder: Decoder, forward: Forward, width: int, budget: Budget, seed: int, report: Reporter
) -> tuple[Units, Costs]:
    """One backward pass, layer by layer from the last; each unit's router is fitted as the gradient reaches it.

    The target is a second-order estimate of the loss that approximating a token costs: ``0.5 (g . e)^2`` in nats, with e
    the forecast's error and g the gradient, at the unit's output, of the cross-entropy against labels drawn from the
    model itself (the Fisher approximation of the Hessian). Each layer is recomputed from its stored input, so the pass
    needs one layer's weights and activations at a time.
    """
    gradient = _output_gradient(decoder, forward.inputs[-1], seed)
    units: Units = {}
    costs: Costs = {}
    blocks, block = gradient.shape[:2]
    with report.stage("routers", decoder.config.num_hidden_layers, blocks * block) as advance:
        for index in reversed(range(decoder.config.num_hidden_layers)):
            layer = decoder.layer(index)
            seen: dict[str, list[tuple[Tensor, Tensor]]] = {unit: [] for unit in UNITS}
            for rows in chunks(blocks, block):
                x = forward.inputs[index][rows].to(decoder.device).requires_grad_()
                inputs, outputs, stream = [], [], x
                for unit in UNITS:
                    inputs.append(layer.norm(unit, stream))
                    outputs.append(layer.run(unit, inputs[-1]))
                    stream = stream + outputs[-1]
                at_x, *at_outputs = torch.autograd.grad(
                    stream, [x, *outputs], grad_outputs=gradient[rows].to(decoder.device)
                )
                gradient[rows] = at_x.cpu()
                with torch.no_grad():
                    for unit, h, y, g in zip(UNITS, inputs, outputs, at_outputs, strict=True):
                        error = forward.forecasters[index, unit](h) - y
                        cost = 0.5 * (g * error).sum(-1) ** 2
                        seen[unit].append((h.detach().flatten(0, 1), cost.flatten()))
            for unit in UNITS:
                h, cost = (torch.cat(parts) for parts in zip(*seen[unit], strict=True))
                router = fit_router(h, cost, width, budget.share(unit), seed)
                units[index, unit] = RoutedUnit(forward.forecasters[index, unit], router)
                with torch.no_grad():
                    scores = score_quantiles(Router(*(t.to(h.device) for t in vars(router).values()))(h))
                costs[index, unit] = Cost(float(cost.mean()), scores)
            advance()
    return {key: units[key] for key in sorted(units)}, costs


def refit_forecasters(
    decoder: Decoder, units: Units, ids: Tensor, threshold: float, rank: int, report: Reporter
) -> Units:
    """One routed forward pass; each forecaster is fitted again on the stream that earlier approximations leave.

    Tokens that the router approximates weigh 1, the others 0.3: the forecaster serves the former, the latter keep it from
    overfitting and let the threshold move later.
    """
    x = decoder.embed(ids)
    refitted: Units = {}
    with torch.no_grad(), report.stage("refit under routing", decoder.config.num_hidden_layers, ids.numel()) as advance:
        for index, layer in decoder.layers():
            for unit in UNITS:
                router: Router = units[index, unit].router
                moments = Moments(x.shape[-1], decoder.device)
                outputs = torch.empty_like(x)
                for rows in chunks(*ids.shape):
                    h = layer.norm(unit, x[rows].to(decoder.device))
                    y = layer.run(unit, h)
                    moments.add(h, y, torch.where(router(h) > threshold, EXECUTED_WEIGHT, 1.0))
                    outputs[rows] = y.cpu()
                forecaster, _ = moments.fit(rank)
                refitted[index, unit] = routed = RoutedUnit(forecaster, router)
                for rows in chunks(*ids.shape):
                    h = layer.norm(unit, x[rows].to(decoder.device))
                    execute = routed.execute(h, threshold)
                    y = outputs[rows].to(decoder.device)
                    x[rows] += merge(execute, y, routed.forecaster(h)).cpu()
            advance()
    return refitted


def _output_gradient(decoder: Decoder, x: Tensor, seed: int) -> Tensor:
    """Gradient of the summed cross-entropy at the last layer's output, labels drawn from the model's own distribution."""
    head, generator = decoder.head(), torch.Generator(decoder.device).manual_seed(seed)
    gradient = torch.empty_like(x)
    for index in range(len(x)):
        rows = x[index].to(decoder.device).requires_grad_()
        logits = head(rows)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradient[index] = torch.autograd.grad(loss, rows)[0].cpu()
    return gradient


def _require_finite(x: Tensor, layer: int, rows: slice) -> None:
    if not x.isfinite().all():
        block = rows.start + int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise UserError(
            f"layer {layer} gives a NaN or infinity on calibration block {block}: "
            "try --dtype float32, or check the weights and the text"
        )

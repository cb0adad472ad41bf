"""The dense passes over the fit blocks: forward, then backward with every unit's forecaster and router fitted on the way."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import Decoder, Layer
from ..families import UNITS
from ..flops import Budget
from ..progress import Reporter
from ..stream import Result, States, Team, Work, by_layer, chunks, embed, named, require_finite, sweep
from ..units import Forecaster, RoutedUnit, Router, Units
from .forecaster import Moments, truncated
from .options import Options
from .router import fit_router

PROBES = 2
# Forecasters are tried at these multiples of the mean rank.
CANDIDATES = (0.25, 0.5, 1.0, 2.0)


@dataclass
class Learnt:
    """What the dense passes leave for one unit.

    Attributes:
        forecaster: of the largest candidate rank; ``truncated`` gives the others.
        router: fitted to the costs of the mean rank.
        unexplained: the share of the output's variance that rank 0, 1, ... leaves unexplained.
        costs: estimated loss, in nats, of approximating each of this process's tokens ``[candidates, tokens]``.
        scores: the router's ``[tokens]``.
    """

    forecaster: Forecaster
    router: Router
    unexplained: Tensor
    costs: Tensor
    scores: Tensor

    def tensors(self) -> Result:
        unit = RoutedUnit(self.forecaster, self.router)
        return {**unit.tensors(), "unexplained": self.unexplained, "costs": self.costs, "scores": self.scores}

    @classmethod
    def from_tensors(cls, tensors: Result) -> "Learnt":
        unit = RoutedUnit.from_tensors(tensors)
        return cls(unit.forecaster, unit.router, *(tensors[name] for name in ("unexplained", "costs", "scores")))

    def at(self, rank: int) -> RoutedUnit:
        return RoutedUnit(truncated(self.forecaster, rank), self.router)


def candidate_ranks(rank: int, hidden: int) -> list[int]:
    return [min(hidden, max(1, round(rank * share))) for share in CANDIDATES] if rank else [0]


def place_of_mean(ranks: list[int]) -> int:
    """Returns which of ``candidate_ranks`` is the mean rank itself."""
    return min(len(ranks) - 1, CANDIDATES.index(1.0))


def run_forward(decoder: Decoder, ids: Tensor, work: Work, report: Reporter) -> list[States]:
    """Runs the dense model over ``ids[blocks, sequence]``; returns every layer's input, and the last layer's output."""
    shape = (*ids.shape, decoder.config.hidden_size)

    @torch.no_grad()
    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        for rows in chunks(*ids.shape):
            x = source[rows].to(decoder.device)
            for unit in UNITS:
                x = x + layer.contribution(unit, x)
                require_finite(x, index, unit, rows)
            target[rows] = x.cpu()
        return {"done": torch.ones(1)}

    _, states = sweep(
        decoder, work, "forward", report, shape, lambda x: embed(decoder, ids, x), step, tokens=ids.numel(), keep=True
    )
    return states


def run_backward(
    decoder: Decoder,
    ids: Tensor,
    count: int,
    states: list[States],
    options: Options,
    work: Work,
    team: Team,
    report: Reporter,
) -> dict[tuple[int, str], Learnt]:
    """One backward pass, layer by layer from the last; each unit is learnt as the gradient reaches it.

    A token's cost is a second-order estimate of the loss that approximating it adds: ``0.5 e' H e`` nats, with e the
    forecast's error and H the generalised Gauss-Newton matrix of the cross-entropy at the unit's output. It is estimated
    from gradients g of random probes v of the logits with covariance diag(p) - p p', the cross-entropy's Hessian there:
    H = E[g g'] (a Gaussian probe has less variance than a label drawn from p, which has the same covariance). Each layer is
    recomputed from its stored input, so one layer's weights and activations are needed at a time.

    Args:
        ids: this process's blocks ``[blocks, sequence]``.
        count: blocks over all processes.
        states: what ``run_forward`` left.
    """
    (rank, width), hidden = options.shape, decoder.config.hidden_size
    ranks = candidate_ranks(rank, hidden)
    shapes = {(0, unit): options.shape for unit in options.units}
    budget = Budget.of_shapes(decoder.config, shapes, options.kv_cache)
    sample = team.sample(count, ids.shape[1], decoder.device)

    def step(index: int, layer: Layer, source: States, target: States) -> Result:
        # Inputs, outputs and gradients of all tokens: filled part by part, for to put parts together takes twice the memory.
        kept = (2 + PROBES, ids.numel(), hidden)
        seen = {unit: torch.empty(kept, device=decoder.device) for unit in options.units}
        for rows in chunks(len(ids), ids.shape[1] * PROBES):
            x = states[index][rows].to(decoder.device).requires_grad_()
            inputs, outputs, stream = {}, {}, x
            for unit in UNITS:
                inputs[unit] = layer.norm(unit, stream)
                outputs[unit] = layer.contribution(unit, stream)
                stream = stream + outputs[unit]
            gradient = source[rows].to(decoder.device)
            at_x = torch.empty_like(gradient)
            gradients: dict[str, list[Tensor]] = {unit: [] for unit in outputs}
            for probe in range(PROBES):
                at_x[:, probe], *at_outputs = torch.autograd.grad(
                    stream, [x, *outputs.values()], gradient[:, probe], retain_graph=probe + 1 < PROBES
                )
                for unit, g in zip(outputs, at_outputs, strict=True):
                    gradients[unit].append(g)
            require_finite(at_x, index, "attention", rows, "gradients")
            target[rows] = at_x.cpu()
            flat = slice(rows.start * ids.shape[1], rows.stop * ids.shape[1])
            for unit in options.units:
                for whole, part in zip(seen[unit], (inputs[unit], outputs[unit], *gradients[unit]), strict=True):
                    whole[flat] = part.detach().flatten(0, 1)
        result: Result = {}
        with torch.no_grad():
            for unit in options.units:
                h, y, *probed = seen.pop(unit)
                forecaster, unexplained = Moments.of(h, y).share(team).fit(max(ranks))
                costs = torch.stack([_cost(truncated(forecaster, each), h, y, probed) for each in ranks])
                # The router is fitted to what the mean rank costs.
                with torch.enable_grad():
                    seed = options.seed + 1000 * index + len(unit)
                    router = fit_router(h, costs[place_of_mean(ranks)], width, budget.share(unit), seed, sample)
                learnt = Learnt(forecaster, router, unexplained, costs, router(h))
                result |= named(unit, learnt.tensors())
        return result

    def start(target: States) -> None:
        _probe_gradients(decoder, ids, states[-1], target, options.seed, team, count)

    shape = (len(ids), PROBES, ids.shape[1], hidden)
    results, last = sweep(decoder, work, "backward", report, shape, start, step, tokens=ids.numel(), backwards=True)
    for stored in (*states, *last):
        stored.discard()
    return {key: Learnt.from_tensors(tensors) for key, tensors in by_layer(results, options.units).items()}


def units_at(learnt: dict[tuple[int, str], Learnt], ranks: dict[tuple[int, str], int]) -> Units:
    """Returns routed units with forecasters of the given ranks."""
    return {key: learnt[key].at(rank) for key, rank in ranks.items()}


def _cost(forecaster: Forecaster, h: Tensor, y: Tensor, gradients: list[Tensor]) -> Tensor:
    costs = []
    for rows in chunks(len(h), 1):
        error = forecaster(h[rows]) - y[rows]
        costs.append(torch.stack([0.5 * (g[rows] * error).sum(-1) ** 2 for g in gradients]).mean(0))
    return torch.cat(costs)


def _probe_gradients(
    decoder: Decoder, ids: Tensor, x: States, target: States, seed: int, team: Team, count: int
) -> None:
    """Fills ``target[blocks, probes, sequence, hidden]`` with the gradient of each probe of the logits at the last layer's output."""
    head = decoder.head()
    for block in range(len(ids)):
        # Drawn by the block's number over all processes: the probes do not depend on who computes them.
        generator = torch.Generator(decoder.device).manual_seed(seed * count + block * team.size + team.rank)
        at_output = torch.empty(1, PROBES, *x.shape[1:])
        stream = x[slice(block, block + 1)].to(decoder.device)
        for tokens in decoder.for_logits(stream.shape[1]):
            rows = stream[:, tokens].requires_grad_()
            logits = head(rows)
            p = logits.detach().softmax(-1)
            for probe in range(PROBES):
                noise = p.sqrt() * torch.randn(p.shape, generator=generator, device=p.device)
                v = noise - p * noise.sum(-1, keepdim=True)
                gradient = torch.autograd.grad(logits, rows, v, retain_graph=probe + 1 < PROBES)[0]
                at_output[:, probe, tokens] = gradient.cpu()
        at_output[:, :, -1] = 0  # the last token's prediction has no target in its block
        target[slice(block, block + 1)] = at_output

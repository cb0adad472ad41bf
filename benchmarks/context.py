"""What attention's forecaster, which sees one token, would gain from seeing others: variance of held-out outputs left unexplained.

    python benchmarks/context.py MODEL --calibration cal.txt

Forecasters are linear, fitted in closed form to the dense model. Beside a token's own hidden state h[t], each may see: h[t-1];
the mean of all h before t; a decaying mean of them; the two before t. ``same FLOPs`` has a smaller rank, so that its two
products cost what the plain one's do. Whatever a forecaster sees of other tokens, a runtime must keep for it beside the KV cache.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ir_convert.calibrate.forecaster import Moments, truncated
from ir_convert.calibrate.options import default_rank
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.decoder import Decoder, Layer
from ir_convert.families import UNITS
from ir_convert.units import Forecaster

DECAY = 0.9
CHUNK = 16  # blocks at a time


def before(h: Tensor, tokens: int = 1) -> Tensor:
    """h ``[blocks, sequence, d]`` of so many tokens earlier; 0 where there is none."""
    return torch.cat([torch.zeros_like(h[:, :tokens]), h[:, :-tokens]], 1)


def mean(h: Tensor) -> Tensor:
    """The mean of all h before a token."""
    count = torch.arange(h.shape[1]).clamp(min=1).view(1, -1, 1)
    return before(h).cumsum(1) / count


def decaying(h: Tensor) -> Tensor:
    """The decaying mean of all h before a token."""
    state, states = torch.zeros_like(h[:, 0]), []
    for token in before(h).unbind(1):
        state = DECAY * state + (1 - DECAY) * token
        states.append(state)
    return torch.stack(states, 1)


CONTEXTS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "the token alone": [],
    "+ the one before": [before],
    "+ the mean of all before": [mean],
    "+ a decaying mean": [decaying],
    "+ the two before": [before, lambda h: before(h, 2)],
}


def unexplained(forecaster: Forecaster, h: Tensor, y: Tensor) -> float:
    return float((forecaster(h) - y).square().sum() / (y - y.mean((0, 1))).square().sum())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    decoder, d = Decoder(checkpoint, torch.device("cpu")), checkpoint.config.hidden_size
    blocks = read_blocks([Source(args.calibration)], checkpoint.tokenizer, args.tokens)
    fit, held_out = (decoder.embed(ids) for ids in (blocks.fit, blocks.threshold))
    rank = default_rank(d)
    rows: dict[str, list[list[float]]] = {name: [] for name in CONTEXTS}
    for _, layer in decoder.layers():
        h, y = layer.norm("attention", fit), outputs(layer.contribution, fit)
        unseen, target = layer.norm("attention", held_out), outputs(layer.contribution, held_out)
        for name, context in CONTEXTS.items():
            moments = Moments(d * (1 + len(context)), d, torch.device("cpu"))
            moments.add(torch.cat([h, *(part(h) for part in context)], -1), y)
            forecaster, _ = moments.fit(rank)
            seen = torch.cat([unseen, *(part(unseen) for part in context)], -1)
            smaller = round(rank * 2 / (2 + len(context)))
            rows[name].append([unexplained(truncated(forecaster, r), seen, target) for r in (rank, smaller)])
        fit, held_out = (mlp(layer, x, by) for x, by in ((fit, y), (held_out, target)))
    print(f"Share of variance unexplained, mean over {len(rows['the token alone'])} layers, rank {rank}\n")
    print("| the forecaster sees | same rank | same FLOPs |\n|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in torch.tensor(values).mean(0).tolist()) + " |")


def outputs(contribution: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([contribution(UNITS[0], part) for part in x.split(CHUNK)])


def mlp(layer: Layer, x: Tensor, attention: Tensor) -> Tensor:
    """The layer's output."""
    return torch.cat([part + layer.contribution(UNITS[1], part) for part in (x + attention).split(CHUNK)])


if __name__ == "__main__":
    main()

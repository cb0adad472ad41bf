"""What attention's forecaster, which sees one token, would gain from seeing others: variance of held-out outputs left unexplained.

    python benchmarks/context.py MODEL --calibration cal.txt

Forecasters are linear, fitted in closed form to the dense model. Beside a token's own hidden state h[t], each may see: h[t-1];
the mean of all h before t; a decaying mean of them; the two before t; or the values v of tokens before, which are narrower where
query heads share them. ``same FLOPs`` has a smaller rank, so that its two products cost what the plain one's do. Of hidden states a
runtime must keep what a forecaster sees of them beside the KV cache, which has the values already.
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


def recent(v: Tensor, tokens: int) -> Tensor:
    """The mean of so many tokens' v, the token's own the last of them."""
    sums = torch.nn.functional.pad(v.cumsum(1), (0, 0, tokens, 0))
    count = torch.arange(1, v.shape[1] + 1).clamp(max=tokens).view(1, -1, 1)
    return (sums[:, tokens:] - sums[:, :-tokens]) / count


def decaying(h: Tensor) -> Tensor:
    """The decaying mean of all h before a token."""
    state, states = torch.zeros_like(h[:, 0]), []
    for token in before(h).unbind(1):
        state = DECAY * state + (1 - DECAY) * token
        states.append(state)
    return torch.stack(states, 1)


CONTEXTS: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
    "the token alone": [],
    "+ the one before": [lambda h, v: before(h)],
    "+ the mean of all before": [lambda h, v: mean(h)],
    "+ a decaying mean": [lambda h, v: decaying(h)],
    "+ the two before": [lambda h, v: before(h), lambda h, v: before(h, 2)],
    "+ the value before": [lambda h, v: before(v)],
    "+ the mean of 4 values": [lambda h, v: recent(v, 4)],
    "+ a decaying mean of values": [lambda h, v: decaying(v)],
    "+ the two values before, and the mean of 16": [
        *(lambda h, v: before(v), lambda h, v: before(v, 2)),
        lambda h, v: recent(v, 16),
    ],
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
    for index, layer in decoder.layers():
        h, y = layer.norm("attention", fit), outputs(layer.contribution, fit)
        unseen, target = layer.norm("attention", held_out), outputs(layer.contribution, held_out)
        project = checkpoint.read_layer(index, torch.float32)["self_attn.v_proj.weight"].T
        inputs = [(x, x @ project) for x in (h, unseen)]
        for name, context in CONTEXTS.items():
            shown, seen = (torch.cat([x, *(part(x, v) for part in context)], -1) for x, v in inputs)
            moments = Moments(shown.shape[-1], d, torch.device("cpu"))
            moments.add(shown, y)
            forecaster, _ = moments.fit(rank)
            smaller = round(rank * 2 * d / (d + shown.shape[-1]))
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

"""What routing adds to the loss on text that a model does not know, once every model may soften its logits.

    python benchmarks/temperature.py MODEL --calibration cal.txt --text books=test.txt --text wiki=FILE --methods greedy,local,polish

A model that is far too sure of itself on foreign text loses less by anything that flattens its predictions: dividing the logits
by a temperature does it, and so does leaving units out. So each model's loss is given at temperature 1 and at its own best one,
both at exactly the asked share of FLOPs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_measure import Routed, saved_on, seek
from quality_methods import END_TO_END, options_of, thresholded
from quality_setting import BLOCK, command_line, describe, parse_texts, read_text, save
from torch.nn import functional as F

from ir_convert.calibrate.recipes import fit, polish
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Blocks, Source, read_blocks
from ir_convert.decoder import Decoder
from ir_convert.evaluate import logits
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work

TEMPERATURES = [round(0.9 + 0.02 * step, 2) for step in range(10)] + [round(1.1 + 0.1 * step, 1) for step in range(20)]
METHODS = ("local", "polish", *END_TO_END)
TOGETHER = 4  # blocks whose logits are in memory


def losses(routed: Routed, ids: torch.Tensor, threshold: float) -> list[float]:
    """Returns the nats a token at each of ``TEMPERATURES``."""
    total = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for part in ids.split(TOGETHER):
        rows = logits(routed.decoder, routed.units, part, threshold, routed.kv_cache)[:, :-1].flatten(0, 1)
        labels = part[:, 1:].flatten()
        total += torch.tensor([float(F.cross_entropy(rows / t, labels, reduction="sum")) for t in TEMPERATURES])
    return (total / (ids.numel() - len(ids))).tolist()


def fitted(checkpoint: Checkpoint, blocks: Blocks, method: str, args: argparse.Namespace) -> Routed:
    recipe = "local" if method == "polish" else method
    options = options_of(recipe, args.sparsity, args.seed, args.steps).settled(checkpoint.config)
    result = fit(checkpoint, blocks, options, torch.device(args.device), Work(), Team(), Silent())
    if method == "polish":
        result = polish(result, blocks, replace(options, polish=args.polish), Work(), Team(), Silent())
    return thresholded(result, options)


def best(values: list[float]) -> tuple[float, float]:
    """Returns the least loss and its temperature."""
    least = min(range(len(values)), key=values.__getitem__)
    return values[least], TEMPERATURES[least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True, metavar="PATH[=WEIGHT]")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--methods", default="local,greedy", help="of " + ", ".join(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text")
    parser.add_argument("--test-tokens", type=int, default=12288, help="of each text, at most")
    parser.add_argument("--steps", type=int, default=300, help="of each stage of an end-to-end recipe")
    parser.add_argument("--polish", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods {', '.join(sorted(unknown))}: give some of {', '.join(METHODS)}")
    checkpoint, paths = Checkpoint.open(args.model), parse_texts(args.text)
    blocks = read_blocks(
        [Source.parse(source) for source in args.calibration], checkpoint.tokenizer, args.tokens, BLOCK
    )
    texts = {name: read_text(path, checkpoint, args.test_tokens) for name, path in paths.items()}
    rows: list[dict[str, Any]] = []
    dense = Routed({}, Decoder(checkpoint, torch.device(args.device)), "full", 0.0, 0.0)
    for method in ["dense", *args.methods.split(",")]:
        routed = dense if method == "dense" else fitted(checkpoint, blocks, method, args)
        for name, ids in texts.items():
            threshold = 0.0
            if method != "dense":
                threshold, _ = seek(saved_on(routed, ids), args.sparsity, routed.start, routed.spread)
            values = losses(routed, ids, threshold)
            plain, (least, temperature) = values[TEMPERATURES.index(1.0)], best(values)
            row = {"method": method, "text": name, "plain": plain, "best": least, "temperature": temperature}
            rows.append(row | {"losses": dict(zip(map(str, TEMPERATURES), values, strict=True))})
            first = next(row for row in rows if row["text"] == name)
            print(
                f"{method:<8} {name:<8} {plain:.3f} nats a token, {least:.3f} at temperature {temperature:g}; "
                f"over dense {plain - first['plain']:+.3f}, {least - first['best']:+.3f}",
                flush=True,
            )
    if args.json:
        config = describe(checkpoint, paths, texts, blocks, args.device) | {"command": command_line()}
        save(args.json, {"config": config, "rows": rows})


if __name__ == "__main__":
    main()

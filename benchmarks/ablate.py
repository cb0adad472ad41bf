"""What a constant or an option of the calibration is worth: the same fit with one thing changed at a time.

    python benchmarks/ablate.py MODEL --calibration cal.txt --text test.txt --text foreign.txt --sparsity 0.4 \\
        --set router.DECAY=0.3 --set dense.PROBES=1 --set rank=16 --set "polish=100"

Each ``--set`` is one run beside the default: ``module.NAME=value`` for a constant in ``ir_convert/calibrate``, ``name=value``
for an option; several joined by ``;`` change together. Perplexity, KL and agreement are at exactly the asked sparsity on each
text, so that they compare at equal work; ``set`` is what the calibration's own threshold saved there.
"""

import argparse
import importlib
import math
import time
from ast import literal_eval
from pathlib import Path
from typing import Any

import torch
from quality_measure import CLOSE, Routed, figures, interpolate, saved_on, seek
from quality_methods import thresholded
from quality_setting import read_text, save

from ir_convert.calibrate import Options
from ir_convert.calibrate.recipes import fit
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work


def _value(text: str) -> Any:
    """Returns a Python literal, or else the text itself: ``recipe=paper``."""
    try:
        return literal_eval(text)
    except ValueError:
        return text


def run(checkpoint: Checkpoint, args: argparse.Namespace, change: str) -> dict[str, Any]:
    """Fits with one change, and measures it at exactly the asked sparsity."""
    options: dict[str, Any] = {"sparsity": args.sparsity, "seed": args.seed}
    before = []
    for assignment in filter(None, change.split(";")):
        name, value = assignment.split("=", 1)
        if "." not in name:
            options[name] = _value(value)
            continue
        module_name, constant = name.rsplit(".", 1)
        module = importlib.import_module(f"ir_convert.calibrate.{module_name}")
        before.append((module, constant, getattr(module, constant)))
        setattr(module, constant, literal_eval(value))
    try:
        blocks = read_blocks([Source(args.calibration)], checkpoint.tokenizer, args.tokens)
        settled = Options(**options).settled(checkpoint.config)
        start = time.monotonic()
        fitted = fit(checkpoint, blocks, settled, torch.device(args.device), Work(), Team(), Silent())
        seconds = time.monotonic() - start
    finally:
        for module, constant, value in before:
            setattr(module, constant, value)
    row: dict[str, Any] = {"change": change or "(default)", "fit_seconds": seconds, "texts": {}}
    for text in args.text:
        ids = read_text(Path(text), checkpoint, args.test_tokens)
        row["texts"][Path(text).name] = _exactly(thresholded(fitted, settled), ids, args.sparsity)
    return row


def _exactly(routed: Routed, ids: torch.Tensor, sparsity: float) -> dict[str, float]:
    """Returns the figures on one text at exactly that sparsity: log-linear between thresholds close around it."""
    own, slope = seek(saved_on(routed, ids), sparsity, routed.start, routed.spread)
    dense, *rows = figures(routed, ids, [own - CLOSE * slope, own + CLOSE * slope, routed.start])
    exact = interpolate(rows, sparsity)
    return {
        "dense": math.exp(dense["log_perplexity"]),
        "perplexity": math.exp(exact["log_perplexity"]),
        "excess": exact["log_perplexity"] - dense["log_perplexity"],
        "kl": exact["kl"],
        "agreement": exact["agreement"],
        "set": rows[-1]["achieved"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--text", required=True, action="append", help="what is measured on: unseen; several are possible"
    )
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE[;NAME=VALUE]")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--test-tokens", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON results")
    args = parser.parse_args()
    checkpoint, rows = Checkpoint.open(args.model), []
    for change in ["", *args.set]:
        rows.append(row := run(checkpoint, args, change))
        for name, values in row["texts"].items():
            line = "  ".join(f"{figure} {value:.4g}" for figure, value in values.items())
            print(f"{row['change']:<40} {name:<24} {line}  fit {row['fit_seconds']:.0f} s", flush=True)
        if args.out:
            settings = {name: str(value) for name, value in vars(args).items()}
            save(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

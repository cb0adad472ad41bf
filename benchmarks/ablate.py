"""What a constant or an option of the calibration is worth: the same fit with one thing changed at a time.

    python benchmarks/ablate.py MODEL --calibration cal.txt --text test.txt --sparsity 0.4 \\
        --set router.DECAY=0.3 --set dense.PROBES=1 --set rank=16 --set "polish=100"

Each ``--set`` is one run beside the default: ``module.NAME=value`` for a constant in ``ir_convert/calibrate``, ``name=value``
for an option; several joined by ``;`` change together. Perplexity, KL and agreement are interpolated to exactly the asked
sparsity on the test text, so that they compare at equal work; ``set`` is what the calibration's own threshold saved there.
"""

import argparse
import importlib
import json
import math
import time
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ir_convert.calibrate import Options
from ir_convert.calibrate.recipes import fit
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.evaluate import measure
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work

AROUND = (-0.12, 0.0, 0.12)  # thresholds around the calibrated one


def run(checkpoint: Checkpoint, args: argparse.Namespace, change: str) -> dict[str, Any]:
    """Fits with one change, and measures it at exactly the asked sparsity."""
    options: dict[str, Any] = {"sparsity": args.sparsity, "seed": args.seed}
    before = []
    for assignment in filter(None, change.split(";")):
        name, value = assignment.split("=", 1)
        if "." not in name:
            options[name] = value if value.isidentifier() else literal_eval(value)
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
    test = read_blocks([Source(args.text)], checkpoint.tokenizer, args.test_tokens)
    ids = torch.cat([test.fit, test.threshold, test.test])
    thresholds = [fitted.near[1] + step for step in AROUND]
    measured = measure(fitted.decoder, fitted.units, ids, thresholds, settled.kv_cache)
    dense, *routed = (measured.quality(k) for k in range(1 + len(thresholds)))

    def exact(values: list[float]) -> float:
        return float(np.polyval(np.polyfit([q.sparsity for q in routed], values, 2), args.sparsity))

    return {
        "change": change or "(default)",
        "dense": dense.perplexity,
        "perplexity": math.exp(exact([math.log(q.perplexity) for q in routed])),
        "kl": exact([q.kl for q in routed]),
        "agreement": exact([q.agreement for q in routed]),
        "set": routed[1].sparsity,
        "overhead": measured.budget.overhead_share,
        "fit_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="what is measured on: unseen in training and calibration")
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
        figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "change")
        print(f"{row['change']:<40} {figures}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            settings = {name: str(value) for name, value in vars(args).items()}
            args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

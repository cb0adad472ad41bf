"""Measures whether an asked budget is met: on text like the calibration's, and on text it did not foresee.

    python benchmarks/budget.py MODEL --calibration PATH[=weight] ... --text NAME=PATH ... [--sparsities 0.1,0.25,...]

One calibration, then for each text and sparsity: what the threshold of the calibrated curve saves, with its standard error
over blocks; and what the exported checkpoint saves while its run-time controller holds the sparsity, over the last 20 of 40
blocks of 256 tokens, from a cold start on that text.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quality_setting import BLOCK, code_sha256, command_line, describe, parse_texts, read_text, save
from torch import Tensor
from transformers import PreTrainedModel

from ir_convert.calibrate import Options, calibrate
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.decoder import Decoder
from ir_convert.evaluate import sparsity_by_block, standard_error
from ir_convert.export import hf
from ir_convert.flops import Budget
from ir_convert.routing import Routing
from ir_convert.stream import run_routed

RESULTS = Path(__file__).parent / "results"
WINDOW, WINDOWS, LAST = 256, 40, 20


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder")
    parser.add_argument("--calibration", action="append", required=True, metavar="PATH[=WEIGHT]")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--sparsities", default="0.10,0.25,0.40,0.55,0.70")
    parser.add_argument("--calibrate-at", type=float, default=0.4)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text")
    parser.add_argument("--test-tokens", type=int, default=32768, help="of each text, at most")
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/budget-MODEL.json")
    args = parser.parse_args(arguments)

    checkpoint, texts = Checkpoint.open(args.model), parse_texts(args.text)
    sources = [Source.parse(text) for text in args.calibration]
    blocks = read_blocks(sources, checkpoint.tokenizer, args.tokens, args.block)
    ids = {name: read_text(path, checkpoint, args.test_tokens, args.block) for name, path in texts.items()}
    start = time.monotonic()
    routing = calibrate(checkpoint, blocks, Options(sparsity=args.calibrate_at), device=args.device)
    config = describe(checkpoint, texts, ids, blocks, args.device) | {
        "command": command_line(),
        "calibrated_at": args.calibrate_at,
        "calibration_seconds": time.monotonic() - start,
        "code_sha256": code_sha256(),
    }
    wanted = [float(part) for part in args.sparsities.split(",")]
    records = measure_budget(checkpoint, routing, ids, wanted, args.device)
    out = args.out or RESULTS / f"budget-{config['model']['name']}.json"
    save(out, {"config": config, "records": records})
    print_table(records)


def measure_budget(
    checkpoint: Checkpoint, routing: Routing, texts: dict[str, Tensor], sparsities: list[float], device: str
) -> list[dict[str, Any]]:
    """Returns a record for each text and sparsity; one that is out of the routing's reach says so."""
    reach = routing.curve.sparsity[-1]
    reached = [sparsity for sparsity in sparsities if sparsity <= reach]
    decoder, thresholds = Decoder(checkpoint, torch.device(device)), [routing.curve.at(asked) for asked in reached]
    budget = Budget.of(checkpoint.config, routing.units, routing.kv_cache)
    records = [{"asked": asked, "failed": f"out of reach: {reach:.3f}"} for asked in sparsities if asked > reach]
    with tempfile.TemporaryDirectory() as folder:
        hf.write(checkpoint, routing, Path(folder))
        model = hf.load(folder, dtype=torch.float32).eval().to(device)
    for name, ids in texts.items():
        x, approximated = run_routed(decoder, routing.units, ids, thresholds, routing.kv_cache)
        x.discard()
        for asked, threshold, saved in zip(
            reached, thresholds, sparsity_by_block(budget, approximated).double(), strict=True
        ):
            row = {"source": name, "asked": asked, "threshold": threshold, "achieved": float(saved.mean())}
            error = standard_error(saved)
            row |= {"standard_error": error if math.isfinite(error) else None, "drift": float(saved.mean()) - asked}
            records.append(row | hold(model, ids, asked))
    return records


@torch.no_grad()
def hold(model: PreTrainedModel, ids: Tensor, asked: float) -> dict[str, Any]:
    """Runs windows of one text under the controller; returns what the last of them saved.

    Args:
        ids: blocks ``[blocks, sequence]`` of the text, cut into windows in their order.
    """
    window = min(WINDOW, ids.shape[1])
    windows = ids[:, : ids.shape[1] // window * window].reshape(-1, window)[:WINDOWS]
    saved = []
    with model.hold_sparsity(asked) as control:
        for row in windows:
            with model.routing_statistics() as seen:
                model(row[None].to(model.device), use_cache=False)
            saved.append(seen.sparsity)
    last = torch.tensor(saved[-LAST:], dtype=torch.float64)
    return {
        "controlled": float(last.mean()),
        "controlled_standard_error": standard_error(last) if len(last) > 1 else None,
        "controlled_drift": float(last.mean()) - asked,
        "controlled_threshold": control.threshold,
        "windows": len(saved),
        "saved_by_window": saved,
    }


def print_table(records: list[dict[str, Any]]) -> None:
    header = ["text", "asked", "achieved", "drift", "controlled", "drift"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in records:
        if "failed" in row:
            print(f"| | {row['asked']:.2f} | {row['failed']} | | | |")
            continue
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        print(
            f"| {row['source']} | {row['asked']:.2f} | {row['achieved']:.4f}{error} | {row['drift']:+.4f} "
            f"| {row['controlled']:.4f} | {row['controlled_drift']:+.4f} |"
        )


if __name__ == "__main__":
    main()

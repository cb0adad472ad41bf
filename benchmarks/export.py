"""What the export of a large random model takes: time beside that of reading its weights and of writing as many bytes as it
wrote to the same disk, memory, and whether it loads.

    python benchmarks/export.py --parameters 1.5 --shape 1B [--rounds 5] [--folder DISK] [--json results.json]

Reading: every tensor once, in its stored precision, from a cold cache where the machine lets us drop it (root), else a warm one.
Reading, plain writing and exports take turns; times are medians over rounds, ratios medians of the rounds' ratios. Every export
runs in a process of its own. Memory is what it allocated at its peak, beyond what it began with; the largest tensor is in fp32.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from from_source import ROOT
from quality_setting import command_line, save
from scale import SHAPES, parameters, resident, write_model
from speed_models import random_routing

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4

EXPORTS: dict[str, tuple[torch.dtype, Int4 | None]] = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "int4": (torch.float32, Int4()),
}


def forget_cache() -> bool:
    """Drops the machine's cache of files, so that reading reads; returns whether it could."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def read(model: Path) -> float:
    """Returns the seconds that it takes to read every tensor once."""
    checkpoint, start = Checkpoint.open(str(model)), time.monotonic()
    for name in checkpoint.shards:
        checkpoint.read(name).view(torch.int16)[..., ::2048].clone()  # touches every page
    return time.monotonic() - start


def write_plain(file: Path, size: int) -> float:
    """Returns the seconds that it takes to write so many bytes until they are on the disk."""
    chunk, start = os.urandom(2**24), time.monotonic()
    with file.open("wb") as out:
        for _ in range(-(-size // len(chunk))):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.monotonic() - start
    file.unlink()
    return seconds


def export(model: Path, out: Path, kind: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(str(model))
    routing, (dtype, int4) = random_routing(checkpoint.config), EXPORTS[kind]
    before, peak, done = resident(os.getpid())[0], [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident(os.getpid())[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        start = time.monotonic()
        write(checkpoint, routing, out, "model.onnx", dtype, int4=int4)
        seconds = time.monotonic() - start
    finally:
        done.set()
        watcher.join()
    onnx.checker.check_model(out / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is about loading alone
    ort.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    largest = max(checkpoint.read(name).numel() for name in checkpoint.shards) * 4
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"kind": kind, "seconds": seconds, "bytes": size, "memory": peak[0] - before, "largest_tensor": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.5, help="in billions")
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="of a layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--folder", type=Path, help="where model and exports go; a temporary folder by default")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "export.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        model, cold = Path(temporary) / "model", forget_cache()
        count = parameters(write_model(model, args.parameters, args.shape))
        print(f"{count / 1e9:.2f} G parameters in bfloat16, {'cold' if cold else 'warm'} cache", flush=True)
        rounds = [one_round(model, Path(temporary), args.kinds) for _ in range(args.rounds)]
    rows = [summary([times[index] for times in rounds]) for index in range(len(args.kinds))]
    for row in rows:
        print(
            f"{row['kind']:<8} {row['seconds']:6.1f} s, {row['over_reading']:.2f} x reading ({row['reading_seconds']:.1f} s), "
            f"{row['over_both']:.2f} x reading and writing ({row['writing_seconds']:.1f} s); {row['bytes'] / 2**30:.2f} GiB; "
            f"{row['memory'] / 2**30:.2f} GiB of memory, {(row['memory'] - row['largest_tensor']) / 2**30:+.2f} beyond the largest tensor"
        )
    result = {"command": command_line(), "parameters": count, "cold_cache": cold, "rounds": args.rounds, "rows": rows}
    save(args.json, result)


def one_round(model: Path, folder: Path, kinds: list[str]) -> list[dict[str, Any]]:
    """Returns a row for every kind of export, with the times of reading and writing that came before it."""
    rows = []
    for kind in kinds:
        forget_cache()
        reading = read(model)
        out = folder / "out"
        out.mkdir()
        forget_cache()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(export, model, out, kind).result()
        shutil.rmtree(out)
        forget_cache()
        rows.append(row | {"reading_seconds": reading, "writing_seconds": write_plain(folder / "plain", row["bytes"])})
        print(f"  {kind:<8} {row['seconds']:6.1f} s, reading {reading:.1f} s", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians over rounds, the most memory, and the quartiles of the ratio to reading."""
    reading = [row["seconds"] / row["reading_seconds"] for row in rows]
    both = [row["seconds"] / (row["reading_seconds"] + row["writing_seconds"]) for row in rows]
    times = {name: median(row[name] for row in rows) for name in ("seconds", "reading_seconds", "writing_seconds")}
    return (
        rows[0]
        | times
        | {
            "over_reading": median(reading),
            "over_reading_quartiles": [float(value) for value in np.quantile(reading, (0.25, 0.75))],
            "over_both": median(both),
            "memory": max(row["memory"] for row in rows),
        }
    )


if __name__ == "__main__":
    main()

"""Compares informed routing with what else there is: perplexity, KL, agreement, FLOPs saved, time and memory.

    python benchmarks/quality.py MODEL --calibration PATH[=weight] ... --text NAME=PATH ... [--seeds 0,1,2]
    python benchmarks/quality.py --print RESULT.json

Fits for different methods and seeds run in fresh processes; peak memory is a process's so far, of all its sparsities. What one
process needs once for several sparsities, or for a method that goes on from another, counts in full for each. Results are saved
after every process; the same command goes on where it stopped, and seeds, sparsities or methods can be added to a file.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from quality_methods import END_TO_END, GROUPS, LABELS, SEEDLESS, Job, run_job
from quality_setting import BLOCK, command_line, describe, parse_texts, read_text, save
from quality_tables import print_all

from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Blocks, Source, read_blocks

RESULTS = Path(__file__).parent / "results"
# What may change between runs that add to one file.
FREE = ("command", "versions", "threads", "machine")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="text to measure on")
    parser.add_argument("--calibration", action="append", default=[], metavar="PATH[=WEIGHT]")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsities", default="0.25,0.4,0.55,0.7")
    parser.add_argument("--methods", default=",".join(LABELS), help="of " + ", ".join(LABELS))
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text")
    parser.add_argument("--test-tokens", type=int, default=32768, help="of each text, at most")
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--steps", type=int, default=600, help="of the paper recipe and of greedy routing")
    parser.add_argument("--polish", type=int, default=100, help="steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/quality-MODEL.json")
    parser.add_argument("--print", type=Path, metavar="FILE", help="print a result's tables and do nothing else")
    args = parser.parse_args(arguments)
    if args.print:
        return print_all(json.loads(args.print.read_text("utf-8")))
    if not (args.model and args.text and args.calibration):
        parser.error("a model, --text and --calibration are needed")
    methods = args.methods.split(",")
    if unknown := set(methods) - set(LABELS):
        parser.error(f"--methods {', '.join(unknown)}: give some of {', '.join(LABELS)}")

    checkpoint, texts = Checkpoint.open(args.model), parse_texts(args.text)
    blocks = read_blocks(
        [Source.parse(text) for text in args.calibration], checkpoint.tokenizer, args.tokens, args.block
    )
    ids = {name: read_text(path, checkpoint, args.test_tokens, args.block) for name, path in texts.items()}
    config = describe(checkpoint, texts, ids, blocks, args.device) | {
        "command": command_line(),
        "block": args.block,
        "steps": args.steps,
        "polish": args.polish,
    }
    out = args.out or RESULTS / f"quality-{config['model']['name']}.json"
    result = open_result(out, config)
    seeds, sparsities = ([kind(part) for part in text.split(",")] for kind, text in
                         ((int, args.seeds), (float, args.sparsities)))  # fmt: skip
    shared = {"texts": ids, "steps": args.steps, "polish": args.polish, "device": args.device}
    for job in jobs(result["records"], methods, seeds, sparsities, model=args.model, blocks=blocks, **shared):
        start = time.monotonic()
        known = {_identity(record) for record in result["records"]}  # a job may measure what is there already, too
        result["records"] += [record for record in run_alone(job) if _identity(record) not in known]
        save(out, result)
        asked = ", ".join(f"{sparsity:g}" for sparsity in job.sparsities)
        print(f"{' + '.join(job.methods)} {asked} seed {job.seed}: {time.monotonic() - start:.0f} s", flush=True)
    print_all(result)


def _identity(record: dict[str, Any]) -> tuple[str, float, int]:
    return record["method"], record["asked"], record["seed"]


def jobs(
    records: list[dict[str, Any]],
    methods: list[str],
    seeds: list[int],
    sparsities: list[float],
    *,
    model: str,
    blocks: Blocks,
    **shared: Any,
) -> Iterator[Job]:
    """Yields what is asked and not yet among ``records``."""
    done = {_identity(record) for record in records}

    def job(group: tuple[str, ...], asked: list[float], seed: int) -> Iterator[Job]:
        sparsities = [s for s in asked if any((method, s, seed) not in done for method in group if method in methods)]
        missing = [
            method for method in group if method in methods and any((method, s, seed) not in done for s in sparsities)
        ]
        if missing:
            yield Job(model, tuple(missing), tuple(sparsities), seed, blocks, **shared)

    # Seedless methods run once, and count as seed 0.
    for group, asked in ((("dense",), [0.0]), (("static",), sparsities)):
        yield from job(group, asked, 0)
    for seed in seeds:
        for group in GROUPS:
            if group[0] in END_TO_END:
                for sparsity in sparsities:
                    yield from job(group, [sparsity], seed)
            elif group[0] not in SEEDLESS:
                yield from job(group, sparsities, seed)


def run_alone(job: Job) -> list[dict[str, Any]]:
    """Runs a job in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_job, job).result()


def open_result(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the result so far; SystemExit where the file is of another configuration."""
    if not path.exists():
        return {"config": config, "records": []}
    result = json.loads(path.read_text("utf-8"))
    config = json.loads(json.dumps(config))
    if different := [name for name in config if name not in FREE and result["config"].get(name) != config[name]]:
        raise SystemExit(f"{path} is of another configuration ({', '.join(different)}): name another --out")
    return {"config": config, "records": result["records"]}


if __name__ == "__main__":
    main()

"""Times routed models against dense ones on ONNX Runtime's CPU provider, beside what routing could gain at best.

    python benchmarks/onnx_speed.py [--quick] [--genai FOLDER] [--json FILE]
    python benchmarks/onnx_speed.py --print benchmarks/results/onnx-speed-NAME.json [--short]

Models have random weights and real sizes; routers are set, by their threshold, to save what is asked on the very tokens
that are timed. The dense side is the faster of our own dense export and the model that onnxruntime-genai's builder writes.
``benchmarks/README.md`` says what is compared and how the ideals are counted. Pinning to cores is the caller's (taskset).
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality_setting import command_line, processor, save
from speed_measure import DENSE_NATIVE, SPARSITIES, compare, plan, versions
from speed_models import SHAPES, build_genai, export, model_facts, random_routing, without_routing, write_checkpoint
from speed_profile import print_profile
from speed_session import CLOCKS, Point, Probe, open_session
from speed_tables import print_all, print_setting, print_short

from ir_convert.checkpoint import Checkpoint
from ir_convert.choices import LOGITS
from ir_convert.export.onnx.ops import find


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.print:
        earlier = [json.loads(path.read_text("utf-8")) for path in args.print]
        if args.short:
            print_short(earlier)
        else:
            for one in earlier:
                print_all(one)
        return
    result: dict[str, Any] = {
        "config": {
            "command": command_line(),
            "machine": processor(),
            "versions": versions(),
            "rounds": args.rounds,
            "steps": args.steps,
            "clock": args.clock,
            "spinning": True,
            "models": {},
            "notes": [],
        },
        "records": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            for record in measure_model(args, name, (args.work or Path(temporary)) / name, result["config"]):
                result["records"].append(record)
                if args.json:  # after every record: a run that is stopped leaves what it has
                    save(args.json, result)
    for note in result["config"]["notes"]:
        print(f"\nNote: {note}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model in fp32 on one thread, few points")
    parser.add_argument("--models", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--precisions", default=None, help="fp32, int4")
    parser.add_argument("--threads", default=None)
    parser.add_argument("--prefill", default=None, help="lengths; 0 for none")
    parser.add_argument("--decode", default="512", help="cached tokens; 0 for none")
    parser.add_argument("--batches", default="1,4", help="of decode; prefill takes one sequence")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--rounds", type=int, help="times taken of everything, in turn")
    parser.add_argument("--steps", type=int, default=16, help="different decode steps, each on the same cache")
    parser.add_argument("--logits", choices=LOGITS, default="all", help="of all models: what prefill computes")
    parser.add_argument("--cache", choices=("auto", "concat", "in-place"), default="auto", help="of our own models")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a busy core")
    parser.add_argument("--genai", type=Path, help="where `pip install --no-deps --target` put onnxruntime-genai")
    parser.add_argument(
        "--native", action="store_true", help="time the native kernels too (python -m ir_convert.export.onnx.ops build)"
    )
    parser.add_argument(
        "--native-dense",
        action="store_true",
        help="with --native: and our dense export with them, for what routing itself gains",
    )
    parser.add_argument("--work", type=Path, help="folder for the models, kept; a temporary one by default")
    parser.add_argument("--json", type=Path, help="where results go, e.g. benchmarks/results/onnx-speed-NAME.json")
    parser.add_argument("--profile", action="store_true", help="also print which operators take the time")
    parser.add_argument("--print", type=Path, nargs="+", metavar="FILE", help="print earlier results, measure nothing")
    parser.add_argument("--short", action="store_true", help="with --print: in one table, as docs/speed.md has it")
    args = parser.parse_args(arguments)
    quick = args.quick
    args.models = (args.models or ("small" if quick else "small,small-mha,1B")).split(",")
    args.precisions = (args.precisions or ("fp32" if quick else "fp32,int4")).split(",")
    if unknown := set(args.precisions) - {"fp32", "int4"}:
        parser.error(f"--precisions {', '.join(unknown)}: give fp32, int4 or both")
    args.threads = _numbers(args.threads or ("1" if quick else "1,2"))
    args.prefill = _numbers(args.prefill or ("128,512" if quick else "128,512,2048"))
    args.decode, args.batches = _numbers(args.decode), _numbers(args.batches)
    args.sparsities = [float(part) for part in args.sparsities.split(",")]
    args.rounds = args.rounds or (5 if quick else 9)
    args.library = _library() if args.native else None
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu counts the time of all threads together: give --threads 1 with it")
    return args


def measure_model(
    args: argparse.Namespace, name: str, folder: Path, config: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Makes one model in every precision, times it, prints a table for each setting; yields records."""
    checkpoint = write_checkpoint(folder / "checkpoint", SHAPES[name])
    routing = random_routing(checkpoint.config)
    config["models"][name] = model_facts(checkpoint.config, routing) | {"logits": args.logits}
    points = [Point(length) for length in args.prefill if length]
    points += [Point(1, cached, batch) for cached in args.decode if cached for batch in args.batches]
    for precision in args.precisions:
        routed = export(checkpoint, routing, folder / f"{precision}-routed", precision, args.logits)
        dense = {"own": export(checkpoint, without_routing(), folder / f"{precision}-own", precision, args.logits)}
        other = folder / (f"{precision}-genai" + "-last" * (args.logits == "last"))
        try:
            dense["genai"] = build_genai(checkpoint.path, other, precision, "cpu", args.genai, args.logits)
        except RuntimeError as reason:
            _note(config, f"{name}, {precision}: compared with our own dense export alone; {reason}")
        plans = _plans(args, checkpoint, routing.units, routed, points, precision)
        for threads in args.threads:
            sessions = {"routed": open_session(routed, "cpu", threads)}
            if args.library:
                sessions["native"] = open_session(routed, "cpu", threads, library=args.library)
                if args.native_dense:
                    sessions[DENSE_NATIVE] = open_session(dense["own"], "cpu", threads, library=args.library)
            sessions |= {which: open_session(path, "cpu", threads) for which, path in dense.items()}
            records = []
            for record in compare(sessions, checkpoint.config, plans, args.rounds, cache=args.cache, clock=args.clock):
                records.append({"model": name, "precision": precision, "threads": threads} | record)
                yield records[-1]
            print_setting(config["models"][name], name, precision, threads, records)
            sessions.clear()
            gc.collect()
            if args.profile:
                print_profile({"routed": routed} | dense, checkpoint.config, plans, records, threads)


def _plans(
    args: argparse.Namespace, checkpoint: Checkpoint, units: Any, routed: Path, points: list[Point], precision: str
) -> list[Any]:
    probe = Probe.open(routed, checkpoint.config, "cpu", max(args.threads))
    return plan(probe, units, points, args.sparsities, args.steps, precision, args.logits)


def _library() -> Path:
    if (library := find()) is None:
        raise SystemExit("no library of native kernels has been built: python -m ir_convert.export.onnx.ops build")
    return library


def _note(config: dict[str, Any], line: str) -> None:
    config["notes"].append(line)
    print(f"\n{line}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

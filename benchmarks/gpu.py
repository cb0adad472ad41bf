"""Times routed models against dense ones on ONNX Runtime's CUDA provider, in fp16: as functions, and with native kernels.

    python benchmarks/gpu.py [--json FILE] [--models 7B-8-layers] [--genai FOLDER]
    python benchmarks/gpu.py --print FILE
    python benchmarks/gpu.py --device cpu --models tiny --prefill 16 --decode 24   # the same code without a GPU, in fp32

First it builds the native kernels, if none have been, and checks the numbers: a small model in fp16 on the device against
fp32 on the CPU. Then it times, as ``onnx_speed.py`` does, with everything bound to the device's memory; a step ends when the
device says it is done; steps of decode are captured in CUDA graphs as well, where ONNX Runtime can. Each time is also printed
as a share of what the device's own measured rates allow. It needs a checkout, not an installation. What does not fit into
``--seconds`` is left out, and named.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import from_source  # noqa: F401
import numpy as np
import onnxruntime as ort
import torch
from quality_setting import command_line, processor, save
from speed_limits import add_limits, measure_limits, print_limits
from speed_measure import GRAPH, SPARSITIES, Plan, compare, draw_tokens, plan, versions
from speed_models import SHAPES, build_genai, export, model_facts, random_routing, without_routing, write_checkpoint
from speed_profile import print_profile
from speed_session import Point, Probe, open_session
from speed_tables import print_all, print_setting
from transformers import PretrainedConfig

from ir_convert.errors import UserError
from ir_convert.export.onnx.ops import build, find, supported
from ir_convert.export.onnx.ops.library import location

# fp16 keeps 11 bits. Logits may be off by this share of the largest, scores by as much as the margin that is looked for.
LOGITS_TOLERANCE = 0.02


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.print:
        result = json.loads(args.print.read_text("utf-8"))
        print_all(result)
        return print_limits(result["records"])
    cuda = args.device == "cuda"
    if cuda and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as torch brought them
    args.deadline = time.monotonic() + args.seconds
    result: dict[str, Any] = {
        "config": {
            "command": command_line(),
            "machine": torch.cuda.get_device_name() if cuda else processor(),
            "versions": versions(),
            "rounds": args.rounds,
            "steps": args.steps,
            "clock": "wall",
            "models": {},
            "notes": [],
        },
        "records": [],
    }
    args.library = None if args.functions_only else native_library(args.device, result["config"]["notes"])
    result["limits"] = measure_limits(args.device, "fp16" if cuda else "fp32")
    print(", ".join(f"{name} {value:.3g}" for name, value in result["limits"].items()))
    if cuda:
        torch.cuda.empty_cache()  # what the limits were measured with is onnxruntime's to use
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        result["numerics"] = verify(Path(temporary) / "verified", args.device, args.library)
        print("numerics: " + ", ".join(f"{name} {value:.3g}" for name, value in result["numerics"].items()), flush=True)
        for name in args.models.split(","):
            measure_model(args, name, Path(temporary) / name, result)
            if args.json:  # what the last points left as notes, too
                save(args.json, result)
    for note in result["config"]["notes"]:
        print(f"\nNote: {note}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", default="7B-8-layers", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--prefill", default="512,2048,8192", help="lengths; 0 for none")
    parser.add_argument("--decode", default="2048", help="cached tokens; 0 for none")
    parser.add_argument("--batches", default="1,4", help="of decode")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="different decode steps, each on the same cache")
    parser.add_argument("--cache", choices=("auto", "concat", "in-place"), default="auto")
    parser.add_argument("--seconds", type=float, default=400, help="no point is begun after this many")
    parser.add_argument("--functions-only", action="store_true", help="without the native kernels")
    parser.add_argument("--profile", action="store_true", help="also print which operators take the time")
    parser.add_argument(
        "--genai", type=Path, help="where onnxruntime-genai was installed to; without it only our export"
    )
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--json", type=Path, help="where results go, e.g. benchmarks/results/gpu-NAME.json")
    parser.add_argument("--print", type=Path, metavar="FILE", help="print earlier results, measure nothing")
    return parser.parse_args(arguments)


def native_library(device: str, notes: list[str]) -> Path | None:
    """Returns the library of native kernels for a device, built now if it has not been; notes why, if there is none."""
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    try:
        library = find()
        partial = library == location() and not _has(library, provider)  # built without CUDA, say by a test
        if library is None or partial:
            library = build(cuda="on" if device == "cuda" else "off")
    except UserError as error:
        notes.append(f"no native kernels: {error}")
        return None
    if not _has(library, provider):
        notes.append(f"no native kernels: {library.name} was built without those of {provider}")
        return None
    return library


def _has(library: Path, provider: str) -> bool:
    return any(where == provider for where, *_ in supported(library))


def verify(folder: Path, device: str, library: Path | None = None) -> dict[str, float]:
    """Compares a small model in fp16 on the device with fp32 on the CPU: dense, and where no score is near the threshold.

    Returns:
        How far off it was; what native kernels were is named after them.

    Raises:
        RuntimeError: logits differ by more than the tolerance, or a decision differs.
    """
    checkpoint = write_checkpoint(folder / "checkpoint", SHAPES["tiny"])
    config, routing = checkpoint.config, random_routing(checkpoint.config)
    files = {precision: export(checkpoint, routing, folder / precision, precision) for precision in ("fp32", "fp16")}
    reference = Probe.open(files["fp32"], config, "cpu", 1)
    found = _verify(reference, Probe.open(files["fp16"], config, device, 1))
    if library is not None:
        native = _verify(reference, Probe.open(files["fp16"], config, device, 1, library))
        found |= {f"native_{name}": value for name, value in native.items() if name.endswith("_off")}
    return found


def _verify(*probes: Probe) -> dict[str, float]:
    """Compares a model, the second, with a reference."""
    config = probes[0].config
    if len(probes[0].scores) != len(probes[0].executes):
        raise RuntimeError("the graph does not show its scores: no margin can be told")
    point = Point(24)
    (ids,) = draw_tokens(config, point, 1)

    def margin(threshold: float) -> float:
        scores = probes[0].run(point, ids, threshold, everything=True)["scores"].values()
        return min(float(np.abs(score - threshold).min()) for score in scores)

    threshold = max(np.linspace(-1, 1, 201).tolist(), key=margin)
    found = {"threshold": threshold, "margin": margin(threshold)}
    for name, value in (("dense", -math.inf), ("routed", threshold)):
        exact, ours = (probe.run(point, ids, value, everything=True) for probe in probes)
        if any((exact["executes"][key] != ours["executes"][key]).any() for key in exact["executes"]):
            raise RuntimeError(f"{name}: fp16 decides otherwise than fp32, with a margin of {found['margin']:.3g}")
        difference = np.abs(exact["logits"] - ours["logits"].astype(np.float32)).max() / np.abs(exact["logits"]).max()
        if not difference <= LOGITS_TOLERANCE:
            raise RuntimeError(f"{name}: logits are off by {difference:.3g} of the largest")
        scores = [np.abs(exact["scores"][key] - ours["scores"][key]).max() for key in exact["scores"]]
        found |= {f"{name}_logits_off": float(difference), f"{name}_scores_off": float(max(scores))}
    return found


def measure_model(args: argparse.Namespace, name: str, folder: Path, result: dict[str, Any]) -> None:
    """Makes one model, times it, prints its table, and adds the records to the result."""
    config, precision = result["config"], "fp16" if args.device == "cuda" else "fp32"
    points = [Point(int(length)) for length in args.prefill.split(",") if int(length)]
    cached = [int(length) for length in args.decode.split(",") if int(length)]
    points += [Point(1, length, int(batch)) for length in cached for batch in args.batches.split(",")]
    checkpoint = write_checkpoint(folder / "checkpoint", SHAPES[name])
    routing = random_routing(checkpoint.config)
    config["models"][name] = model_facts(checkpoint.config, routing)
    models = {
        "routed": export(checkpoint, routing, folder / "routed", precision),
        "own": export(checkpoint, without_routing(), folder / "own", precision),
    }
    if args.genai:
        try:
            models["genai"] = build_genai(checkpoint.path, folder / "genai", precision, args.device, args.genai)
        except RuntimeError as reason:
            config["notes"].append(f"{name}: compared with our own dense export alone; {reason}")
    probe = Probe.open(models["routed"], checkpoint.config, args.device, 1)
    sessions = {which: open_session(path, args.device, 1) for which, path in models.items()}
    if args.library:
        sessions["native"] = open_session(models["routed"], args.device, 1, library=args.library)
    if args.device == "cuda":
        add_graphs(sessions, models, args.library, f"{name}: ", config["notes"])
    records, plans = [], []
    sparsities = [float(part) for part in args.sparsities.split(",")]
    for point in points:
        if time.monotonic() > args.deadline:
            config["notes"].append(f"{name}, {point}: left out, no time")
            continue
        try:
            planned = plan(probe, routing.units, [point], sparsities, args.steps, precision)
            found = compare_or_without_graphs(
                sessions, checkpoint.config, planned, args, f"{name}, {point}", config["notes"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class of their own; other points may do
            config["notes"].append(f"{name}, {point}: {str(error).splitlines()[0]}")
            continue
        plans += planned
        for record in found:
            record |= {"model": name, "precision": precision, "threads": 1, "device": args.device}
            records.append(add_limits(checkpoint.config, record, result["limits"]))
            result["records"].append(records[-1])
        if args.json:  # after every point: a run that is stopped leaves what it has
            save(args.json, result)
    print_setting(config["models"][name], name, precision, 1, records)
    print_limits(records)
    sessions.clear()
    del probe
    gc.collect()
    if args.profile and time.monotonic() < args.deadline:
        print_profile(models, checkpoint.config, plans, records, 1, args.device)


def compare_or_without_graphs(
    sessions: dict[str, ort.InferenceSession],
    config: PretrainedConfig,
    plans: list[Plan],
    args: argparse.Namespace,
    where: str,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Times a point; once more without CUDA graphs, which are captured in the first run, if that fails with them."""
    try:
        return list(compare(sessions, config, plans, args.rounds, args.device, args.cache))
    except Exception as error:
        graphs = [name for name in sessions if name.endswith(GRAPH)]
        if not graphs:
            raise
        notes.append(f"{where}: without CUDA graphs: {str(error).splitlines()[0]}")
        for name in graphs:
            del sessions[name]
        return list(compare(sessions, config, plans, args.rounds, args.device, args.cache))


def add_graphs(
    sessions: dict[str, ort.InferenceSession],
    models: Mapping[str, Path],
    library: Path | None,
    prefix: str,
    notes: list[str],
) -> None:
    """Adds sessions that capture CUDA graphs: of both models, by native kernels; a note says what cannot be.

    Functions are left out: their branches, and their counts of executed rows, are the host's to decide.
    """
    for name, model in {"own_graph": "own", "native_graph": "routed"}.items() if library else ():
        try:
            sessions[name] = open_session(models[model], "cuda", 1, library=library, graph=True)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            notes.append(f"{prefix}{name}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()

"""Where the time goes: onnxruntime's own profile, by operator."""

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_measure import Plan
from speed_session import Runner, open_session
from transformers import PretrainedConfig

TOP, ROUNDS = 14, 4


def print_profile(
    models: Mapping[str, Path],
    config: PretrainedConfig,
    plans: Sequence[Plan],
    records: Sequence[Mapping[str, Any]],
    threads: int,
    device: str = "cpu",
    sparsities: Sequence[float] = (0.0, 0.4),
) -> None:
    """Prints for every point the operators that take most, in milliseconds a step, of each model side by side.

    Args:
        models: files by name; ``routed`` is run at each of the sparsities.
        config: of the models.
        plans: what was timed.
        records: what came of it, which says how the cache was bound.
        threads: of an operator.
        device: cpu or cuda.
        sparsities: of the plans' which are asked for.
    """
    for this in plans:
        point = this.point
        in_place = any(
            record["cache"] == "in-place"
            for record in records
            if (record["tokens"], record["cached"], record["batch"]) == (point.tokens, point.cached, point.batch)
        )
        columns: dict[str, dict[str, tuple[float, float]]] = {}
        for name, path in models.items():
            thresholds = [(name, None)]
            if name == "routed":
                thresholds = [
                    (f"routed {row['asked']:g}", row["threshold"]) for row in this.chosen if row["asked"] in sparsities
                ]
            for column, threshold in thresholds:
                with tempfile.TemporaryDirectory() as folder:
                    session = open_session(path, device, threads, Path(folder) / "profile")
                    runner = Runner(session, config, point, this.steps, threshold, in_place or name == "genai", device)
                    for _ in range(ROUNDS + 1):
                        runner()
                    columns[column] = by_operator(Path(session.end_profiling()), len(this.steps))
        print(f"\nProfile of {point}: milliseconds a step (nodes a step)\n")
        totals: dict[str, float] = defaultdict(float)
        for column in columns.values():
            for operator, (milliseconds, _) in column.items():
                totals[operator] = max(totals[operator], milliseconds)
        print(f"{'':32}" + "".join(f"{column:>20}" for column in columns))
        for operator in sorted(totals, key=lambda name: -totals[name])[:TOP]:
            _print_row(operator, [column.get(operator, (0.0, 0.0)) for column in columns.values()])
        _print_row("all", [tuple(map(sum, zip(*column.values(), strict=True))) for column in columns.values()])


def _print_row(name: str, cells: Sequence[tuple[float, ...]]) -> None:
    print(f"{name:32}" + "".join(f"{milliseconds:12.3f} ({nodes:5.0f})" for milliseconds, nodes in cells))


def by_operator(profile: Path, steps: int) -> dict[str, tuple[float, float]]:
    """Returns (milliseconds, nodes) of one step by operator type.

    Of every node's time in every step, that of all its runs where it is in a loop, the least over the rounds counts: other
    processes disturb what is longer. A node with a branch lasts as long as its branch: what it runs is counted under its own name,
    so it is left out.
    """
    events = json.loads(profile.read_text("utf-8"))
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    calls = steps + 1 if steps > 1 else 1  # a runner begins with a step that wakes the session up
    taken: dict[tuple[str, str, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        round_, step = divmod(bisect_right(starts, event["ts"]) - 1, calls)
        operator = event["args"]["op_name"]
        if round_ > 0 and step >= calls - steps and operator not in ("If", "Loop"):
            taken[operator, event["name"], step][round_] += event["dur"]
    found: dict[str, list[float]] = defaultdict(list)
    for (operator, _, _), rounds in taken.items():
        found[operator].append(min(rounds.values()))
    return {name: (sum(times) / 1e3 / steps, len(times) / steps) for name, times in found.items()}

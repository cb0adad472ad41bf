"""Prints what ``quality.py`` measured: a table for each sparsity and view, and whether the targets are met."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from quality_measure import POOLED
from quality_methods import LABELS

Record = dict[str, Any]
VIEWS = {
    "deployed": "one threshold for all text, set on held-out calibration text",
    "exact": "threshold moved for each text until it saves what was asked (static: between two counts of units)",
}


def print_all(result: dict[str, Any]) -> None:
    records = result["records"]
    good = [record for record in records if "failed" not in record]
    config = result["config"]
    model = config["model"]
    print(
        f"## {model['name']}: {model['type']}, {model['layers']} layers, {model['parameters'] / 1e6:.2f} M parameters"
    )
    print(f"{config['machine']}, {config['threads']} thread(s), torch {config['versions']['torch']}; calibrated on")
    print(f"{sum(config['calibration']['tokens'].values())} tokens; measured on", end=" ")
    print(", ".join(f"{text['tokens']} of {name}" for name, text in config["texts"].items()))
    if len({record["code_sha256"] for record in records}) > 1:
        print("\n**The records are of different states of the converter's code.**")
    for sparsity in sorted({record["asked"] for record in good} - {0.0}):
        for view, what in VIEWS.items():
            _print_table(good, sparsity, view, what, [*config["texts"], POOLED])
    for record in records:
        if "failed" in record:
            print(f"\n{LABELS[record['method']]} at {record['asked']:g}, seed {record['seed']}: {record['failed']}")
    print_targets(good, [*config["texts"], POOLED])


def _print_table(records: list[Record], sparsity: float, view: str, what: str, sources: list[str]) -> None:
    print(f"\n### {sparsity:.0%} of the FLOPs asked: {view}\n{what}\n")
    header = [
        "method",
        "text",
        "perplexity",
        "KL",
        "top-1",
        "FLOPs saved",
        "decisions",
        "fit s",
        "CPU s",
        "peak MiB",
        "seeds",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for method, label in LABELS.items():
        for source in sources:
            rows = select(records, method, 0.0 if method == "dense" else sparsity, view, source)
            if not rows:
                continue
            # What a fit takes has nothing to do with the text: told once.
            cost = [""] * 3
            if source == sources[-1]:
                cost = [_spread(rows, "fit_seconds", ".1f"), _spread(rows, "fit_cpu_seconds", ".1f"), _memory(rows)]
            cells = [
                label,
                source,
                _spread(rows, "perplexity", ".2f"),
                _spread(rows, "kl", ".3f"),
                _spread(rows, "agreement", ".3f"),
                _spread(rows, "achieved", ".3f"),
                _spread(rows, "decisions", ".3f"),
                *cost,
                str(len(rows)),
            ]
            print("| " + " | ".join(cells) + " |")


def print_targets(records: list[Record], sources: list[str]) -> None:
    """Says for every sparsity and text whether the targets are met: means over seeds, at the exact budget.

    Times are judged by the processor's, which neither other work nor a pause changes much.
    """
    print("\n### Targets, at the exact budget, means over seeds\n")
    for sparsity in sorted({record["asked"] for record in records} - {0.0}):
        for method, most_ratio, most_time in (("polish", 1.0, 1 / 5), ("local", 1.03, 1 / 20)):
            for source in sources:
                ours = select(records, method, sparsity, "exact", source)
                paper = select(records, "paper", sparsity, "exact", source)
                if not ours or not paper:
                    continue
                ratio = _mean(ours, "perplexity") / _mean(paper, "perplexity")
                seconds = _mean(ours, "fit_seconds") / _mean(paper, "fit_seconds")
                processor = _mean(ours, "fit_cpu_seconds") / _mean(paper, "fit_cpu_seconds")
                print(
                    f"- {sparsity:.0%} {source}: {LABELS[method]} {_mean(ours, 'perplexity'):.2f} against "
                    f"{_mean(paper, 'perplexity'):.2f} ({ratio:.3f}, asked <= {most_ratio:g}: {_yes(ratio <= most_ratio)}), "
                    f"in {_mean(ours, 'fit_seconds'):.1f} s against {_mean(paper, 'fit_seconds'):.1f} "
                    f"(1/{1 / seconds:.1f}, CPU time 1/{1 / processor:.1f}, asked 1/{1 / most_time:.0f}: {_yes(processor <= most_time)})"
                )
    for method in ("local", "polish"):
        for source in sources:
            keys = (method, 0.4), ("greedy", 0.4), ("dense", 0.0)
            rows = [select(records, *key, "exact", source) for key in keys]
            if not all(rows):
                continue
            ours, greedy, dense = (math.log(_mean(row, "perplexity")) for row in rows)
            share = (ours - dense) / (greedy - dense)
            print(
                f"- 40% {source}: {LABELS[method]} adds {ours - dense:.3f} nats, greedy end to end {greedy - dense:.3f} "
                f"({share:.2f} of it, asked <= 0.5: {_yes(share <= 0.5)})"
            )


def select(records: Iterable[Record], method: str, asked: float, view: str, source: str) -> list[Record]:
    wanted = {"method": method, "asked": asked, "view": view, "source": source}
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


def _mean(rows: list[Record], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _spread(rows: list[Record], name: str, form: str) -> str:
    """Mean and sample standard deviation over seeds."""
    if any(name not in row for row in rows):
        return "-"
    spread = f" ± {statistics.stdev(row[name] for row in rows):{form}}" if len(rows) > 1 else ""
    return f"{_mean(rows, name):{form}}{spread}"


def _memory(rows: list[Record]) -> str:
    """The most resident memory up to the fit's end, and how much of it was there before (libraries, texts)."""
    if any("peak_memory_bytes" not in row for row in rows):
        return "-"
    peak, before = (max(row[name] for row in rows) / 2**20 for name in ("peak_memory_bytes", "resident_before_bytes"))
    device = max(row["peak_device_memory_bytes"] for row in rows) / 2**20
    return f"{peak:.0f} ({before:.0f} before)" + (f", GPU {device:.0f}" if device else "")


def _yes(condition: bool) -> str:
    return "yes" if condition else "NO"

"""Prints what ``onnx_speed.py`` and ``gpu.py`` measured."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from speed_measure import DENSE_NATIVE, target
from speed_session import Point

HEADER = ("saved, asked", "achieved", "dense ms", "routed ms", "ratio", "quartiles", "ideal", "ratio/ideal", "target")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "int4": "int4"}
NATIVE = ("native ms", "native/functions", "quartiles", "ratio", "ratio/ideal", "target")
OF_ITS_DENSE = "native/its dense"  # by the same kernels
DENSE = {
    "own": "our dense export",
    DENSE_NATIVE: "it with native kernels",
    "own_graph": "it in CUDA graphs",
    "genai": "onnxruntime-genai's builder",
}


def print_all(result: Mapping[str, Any]) -> None:
    config = result["config"]
    names = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    print(f"## Routed against dense on {config['machine']}\n{names}; {config['clock']} clock\n`{config['command']}`")
    for line in config.get("notes", []):
        print(f"- {line}")
    key = lambda record: (record["model"], record["precision"], record["threads"])  # noqa: E731
    for (model, precision, threads), records in groupby(result["records"], key):
        print_setting(config["models"][model], model, precision, threads, records)


HEAD_OF = {"all": "every position", "last": "each sequence's last position alone"}


def print_setting(
    facts: Mapping[str, Any], model: str, precision: str, threads: int, records: Iterable[Mapping[str, Any]]
) -> None:
    print(
        f"\n### {model}, {precision}, {threads} thread(s)\n{facts['layers']} layers, width {facts['hidden']}, MLP "
        f"{facts['ffn']}, {facts['heads']} heads, {facts['kv_heads']} of keys; forecasters' rank {facts['rank']}, routers' "
        f"width {facts['router_width']}: {facts['overhead']:.1%} of the linear FLOPs;\nthe head "
        f"({facts['vocabulary']} tokens{', tied' if facts['tied'] else ''}) is {facts['head_share']:.1%} of all "
        f"projections' and counted on both sides, for {HEAD_OF[facts.get('logits', 'all')]}."
    )
    point = lambda record: Point(record["tokens"], record["cached"], record["batch"])  # noqa: E731
    for where, rows in groupby(records, point):
        print_point(where, list(rows))


def print_point(where: Point, rows: list[Mapping[str, Any]]) -> None:
    times = ", ".join(f"{DENSE[name]} {ms:.2f} ms" for name, ms in rows[0]["dense_ms"].items())
    print(f"\n**{where}** (cache {rows[0]['cache']}; {times})\n")
    header = (*HEADER, *NATIVE) if "native_ms" in rows[0] else HEADER
    header += (OF_ITS_DENSE,) * ("native_to_native_dense" in rows[0])
    print_table([header, *(_cells(row) for row in rows)])


def print_short(results: Sequence[Mapping[str, Any]]) -> None:
    """Prints one table for each model and number of threads, over all results: a row a point, a column a sparsity.

    Of results that hold the same point the last one counts: give those of one machine.
    """
    rows = [(result["config"]["models"][row["model"]], row) for result in results for row in result["records"]]
    setting = lambda pair: (pair[1]["model"], pair[1]["threads"])  # noqa: E731
    for (model, threads), group in groupby(sorted(rows, key=setting), setting):
        points: dict[tuple[Any, ...], dict[float, str]] = {}
        for facts, row in group:
            tokens, last = row["tokens"], facts.get("logits") == "last"
            key = (last, row["cached"], row["batch"], tokens, row["precision"])
            points.setdefault(key, {})[row["asked"]] = _short(row)
        asked = sorted({share for cells in points.values() for share in cells})
        print(
            f"\n| {model}, {threads} thread(s); FLOPs saved | " + " | ".join(f"{share:.0%}" for share in asked) + " |"
        )
        print("|---" * (1 + len(asked)) + "|")
        for (last, cached, batch, tokens, precision), cells in sorted(points.items()):
            texts = f"{batch} text{'s' * (batch > 1)}"
            what = f"decode, {cached} cached, {texts}" if cached else f"prefill, {tokens} tokens"
            name = f"{what}, {PRECISIONS[precision]}{', `--logits last`' * last}"
            print("| " + " | ".join([name, *(cells.get(share, "-") for share in asked)]) + " |")


def _short(row: Mapping[str, Any]) -> str:
    """A cell: the ratios to a dense model; where it was timed by native kernels as well, theirs to that alone."""
    if "native_to_native_dense" in row:
        return f"{row['native_to_native_dense']:.2f} ({row['ideal']:.2f})"
    native = f" / **{row['native_ratio']:.2f}**" if "native_ratio" in row else ""
    return f"{row['ratio']:.2f}{native} ({row['ideal']:.2f})"


def print_table(cells: list[tuple[str, ...]]) -> None:
    """Prints rows of equal length, a header first, as a table in Markdown."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for index, line in enumerate(cells):
        print("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    quartiles = row["ratio_quartiles"]
    return (
        f"{row['asked']:.2f}",
        f"{row['achieved']:.3f}",
        f"{row['dense_ms'][row['dense']]:.2f}",
        f"{row['routed_ms']:.2f}",
        f"{row['ratio']:.3f}",
        f"{quartiles[0]:.3f}-{quartiles[1]:.3f}",
        f"{row['ideal']:.3f}",
        f"{row['ratio'] / row['ideal']:.3f}",
        _verdict(row, row["ratio"]),
        *_native_cells(row),
    )


def _native_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "native_ms" not in row:
        return ()
    low, high = row["native_to_functions_quartiles"]
    ratio = row["native_ratio"]
    return (
        f"{row['native_ms']:.2f}",
        f"{row['native_to_functions']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{ratio:.3f}",
        f"{ratio / row['ideal']:.3f}",
        _verdict(row, ratio),
        *(f"{row[name]:.3f}" for name in ("native_to_native_dense",) if name in row),
    )


def _verdict(row: Mapping[str, Any], ratio: float) -> str:
    if (judged := target(row, ratio)) is None:
        return "-"
    value, most = judged
    return f"{'ratio' if row['asked'] == 0 else 'r/i'} <= {most:.2f}: {'yes' if value <= most else 'NO'}"

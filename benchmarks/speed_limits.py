"""What a device could do at best: a point's time at the device's own measured rates, and how near to it a model comes.

Prefill is bound by arithmetic, the FLOPs of ``speed_ideal.py`` over the rate of a large matrix product; decode by memory: the
bytes of weights, and of the cache of those heads whose attention executes, over the rate of a large copy.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from speed_ideal import BYTES, dense_bytes, dense_flops
from speed_measure import MOST_AT_ZERO, NATIVE
from speed_session import Point
from speed_tables import print_table
from transformers import PretrainedConfig

from ir_convert.families import head_dim

# Of the ideal speed-up over the dense model, on an H100, in fp16 with native kernels.
TARGETS = {("decode", 1, 0.4): 0.85, ("prefill", 2048, 0.4): 0.90}
REPEATS = 20


def measure_limits(device: str, precision: str) -> dict[str, float]:
    """Measures a device: ``bytes_per_second`` of a copy (read and written), ``flops_per_second`` of a matrix product."""
    cuda, dtype = device == "cuda", torch.float16 if precision == "fp16" else torch.float32
    count, size = ((1 << 30), 8192) if cuda else (1 << 24, 1024)
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), cuda)
    copied = 2 * source.numel() * source.element_size() / seconds
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return {"bytes_per_second": copied, "flops_per_second": 2 * size**3 / _seconds(lambda: a @ b, cuda)}


def _seconds(run: Callable[[], Any], cuda: bool) -> float:
    """Returns the median time of a call."""
    times = []
    for _ in range(REPEATS + 3):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def limit_ms(config: PretrainedConfig, record: Mapping[str, Any], limits: Mapping[str, float], dense: bool) -> float:
    """Returns the least milliseconds that a record's point can take, of the dense model or of the routed one."""
    point = Point(record["tokens"], record["cached"], record["batch"])
    share = 1.0 if dense else record["ideal"]
    if point.kind == "prefill":
        return 1e3 * share * dense_flops(config, point.batch, point.tokens) / limits["flops_per_second"]
    cache = 2 * BYTES[record["precision"]] * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    read = cache * point.batch * point.total * (1.0 if dense else record["attention"])
    return 1e3 * (share * dense_bytes(config, record["precision"]) + read) / limits["bytes_per_second"]


def add_limits(config: PretrainedConfig, record: dict[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Adds each model's limit over its time to a record, and which part of the ideal speed-up the best native run reaches."""
    routed, dense = (limit_ms(config, record, limits, which) for which in (False, True))
    shares = {"routed": routed / record["routed_ms"], "dense": dense / record["dense_ms"][record["dense"]]}
    shares |= {which: routed / record[f"{which}_ms"] for which in NATIVE if f"{which}_ms" in record}
    ratios = [record[f"{which}_ratio"] for which in NATIVE if f"{which}_ratio" in record]
    return record | {
        "limit_ms": routed,
        "shares_of_limit": shares,
        "of_ideal_speedup": record["ideal"] / min([*ratios, record["ratio"]]),
    }


def print_limits(records: Sequence[Mapping[str, Any]]) -> None:
    """Prints each model's share of the limit, and the targets."""
    header = (
        "point",
        "saved, asked",
        "limit ms",
        "dense",
        "functions",
        "native",
        "in graphs",
        "of ideal speed-up",
        "target",
    )
    print(
        "\nShares of the limit: bytes over the rate of a copy (decode), FLOPs over that of a matrix product (prefill)\n"
    )
    print_table([header, *(_cells(record) for record in records)])


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    point = Point(record["tokens"], record["cached"], record["batch"])
    shares = record["shares_of_limit"]
    columns = (f"{shares[name]:.2f}" if name in shares else "-" for name in ("dense", "routed", *NATIVE))
    reached, verdict = record["of_ideal_speedup"], "-"
    size = point.batch if point.kind == "decode" else point.tokens
    if record["asked"] == 0:
        slower = record["ideal"] / reached
        verdict = f"ratio <= {MOST_AT_ZERO}: {'yes' if slower <= MOST_AT_ZERO else 'NO'} ({slower:.3f})"
    elif (least := TARGETS.get((point.kind, size, record["asked"]))) is not None:
        verdict = f">= {least:.2f}: {'yes' if reached >= least else 'NO'}"
    return (str(point), f"{record['asked']:.2f}", f"{record['limit_ms']:.3f}", *columns, f"{reached:.3f}", verdict)

"""What a graph computes once per run: attention masks, and which tokens may execute at all. See also ``rotary.py``."""

import math
from typing import NamedTuple

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import largest

END = 2**63 - 1
INT32 = ir.DataType.INT32


def attention_masks(
    op: OpBuilder, real: ir.Value, places: ir.Value, windows: set[int | None]
) -> dict[int | None, ir.Value]:
    """Builds one mask ``bool[B, S, T]`` for each distinct sliding window, from which tokens are ``real[B, T]``.

        real -> Shape -> Range: place of every key [T]
        visible = key <= query  (and count[key] > count[query] - window)  and (real[key] or key = query)

    Places are cache slots, padding included, so padding may be anywhere: left, right, or, as onnxruntime-genai's batches
    have it, between a prompt and what follows. A window counts real tokens alone. Every token sees itself: padding that
    saw nothing would turn into NaN, which reaches real tokens through the next layer's values.

    Args:
        places: ``int64[S]``: those of the new tokens, which are the queries.
    """
    counts = op.CumSum(op.Cast(real, to=ir.DataType.INT64), 1) if windows - {None} else None  # [B, T]
    real = op.Unsqueeze(real, [1])  # [B, 1, T]
    total = op.Squeeze(op.Shape(real, start=2, end=3))
    keys = op.Range(0, total, 1)
    queries = op.Unsqueeze(places, [1])  # [S, 1]
    causal = op.LessOrEqual(keys, queries)  # [S, T]
    real = op.Or(real, op.Equal(keys, queries))  # [B, S, T]
    masks = {}
    for window in sorted(windows, key=lambda window: window or math.inf):
        visible = causal
        if window is not None:
            own = op.Unsqueeze(op.Gather(counts, places, axis=1), [2])  # [B, S, 1]
            visible = op.And(causal, op.Greater(op.Unsqueeze(counts, [1]), op.Sub(own, window)))
        masks[window] = op.And(real, visible, _outputs=[f"attention.visible{_suffix(window)}"])
    return masks


def step_biases(op: OpBuilder, masks: dict[int | None, ir.Value], dtype: ir.DataType) -> dict[int | None, ir.Value]:
    """Each mask ``bool[B, S, T]`` -> the last new token's row, in numbers to add to scores: 0 or -inf, ``F[B, 1, 1, T]``."""
    biases = {}
    for window, mask in masks.items():
        last = op.Unsqueeze(op.Slice(mask, [-1], [END], [1]), [1])
        name = f"attention.step_bias{_suffix(window)}"
        biases[window] = op.Cast(op.Where(last, 0.0, -math.inf), to=dtype, _outputs=[name])
    return biases


def _suffix(window: int | None) -> str:
    return "" if window is None else f".window_{window}"


class Slots(NamedTuple):
    """Where the S new tokens of a call go among the T slots of the cache that are in use then.

    Attributes:
        first: T - S, the slot of the first new token, ``int64[1]``.
        places: the slots of all new tokens, T - S to T - 1, ``int64[S]``.
        start: the first of them for every sequence, ``int32[B]``.
        total: T, ``int32[1]``.
        step: whether the call appends one token of one sequence to caches with room, ``bool[1]``.
    """

    first: ir.Value
    places: ir.Value
    start: ir.Value
    total: ir.Value
    step: ir.Value


def slots(op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, past: ir.Value) -> Slots:
    """Finds them from input_ids ``[B, S]``, attention_mask ``[B, T]`` and any layer's past keys ``[B, K, P, D]``."""
    end = op.Shape(attention_mask, start=1, end=2)  # [1]
    first = op.Sub(end, op.Shape(input_ids, start=1, end=2))
    # On a GPU a Range reads its limits on the host and gives its numbers on the device; first itself would have to be copied,
    # and of a model with copies ONNX Runtime captures no CUDA graph.
    places = op.Range(op.Squeeze(first), op.Squeeze(end), 1)
    start = op.Cast(op.Slice(places, [0], [1]), to=INT32)
    start = op.Expand(start, op.Shape(input_ids, end=1), _outputs=["attention.start"])
    total = op.Cast(end, to=INT32, _outputs=["attention.total"])
    room = op.LessOrEqual(end, op.Shape(past, start=2, end=3))
    return Slots(
        first, places, start, total, op.And(op.Equal(op.Size(input_ids), 1), room, _outputs=["attention.step"])
    )


def new_tokens(op: OpBuilder, real: ir.Value, first: ir.Value) -> ir.Value:
    """real ``[B, T]`` -> ``[B, S]``: which of the new tokens are real."""
    return op.Slice(real, first, [END], [1], _outputs=["new_tokens"])


def last_tokens(op: OpBuilder, x: ir.Value, new: ir.Value) -> ir.Value:
    """x ``[B, S, d]`` -> ``[B, 1, d]``: each sequence's last token of those that are ``new[B, S]``, wherever its padding is."""
    places = op.Range(0, op.Squeeze(op.Shape(new, start=1, end=2)), 1)
    last = largest(op, op.Where(new, places, 0), 1)  # [B, 1]
    return op.GatherND(x, op.Unsqueeze(last, [2]), batch_dims=1, _outputs=["last_tokens"])


def token_threshold(op: OpBuilder, new: ir.Value, threshold: ir.Value) -> ir.Value:
    """threshold ``[1]`` -> ``[B, S]``: the threshold for real tokens, +inf for padding, which therefore never executes."""
    return op.Where(new, threshold, math.inf, _outputs=["token_threshold"])

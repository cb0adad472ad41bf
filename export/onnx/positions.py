"""What a graph computes once per run: attention masks, and which tokens may execute at all. See also ``rotary.py``."""

import math

import onnx_ir as ir
from onnxscript import OpBuilder

END = 2**63 - 1


def attention_masks(
    op: OpBuilder, real: ir.Value, first: ir.Value, windows: set[int | None]
) -> dict[int | None, ir.Value]:
    """Builds one mask ``bool[B, S, T]`` for each distinct sliding window, from which tokens are ``real[B, T]``.

        real -> Shape -> Range: place of every key [T] -> Slice(first): place of every query [S]
        visible = key <= query  (and count[key] > count[query] - window)  and (real[key] or key = query)

    Places are cache slots, padding included, so padding may be anywhere: left, right, or, as onnxruntime-genai's batches
    have it, between a prompt and what follows. A window counts real tokens alone. Every token sees itself: padding that
    saw nothing would turn into NaN, which reaches real tokens through the next layer's values.

    Args:
        first: ``int64[1]``: the place of the first new token.
    """
    counts = op.CumSum(op.Cast(real, to=ir.DataType.INT64), 1) if windows - {None} else None  # [B, T]
    real = op.Unsqueeze(real, [1])  # [B, 1, T]
    total = op.Squeeze(op.Shape(real, start=2, end=3))
    keys = op.Range(0, total, 1)
    queries = op.Unsqueeze(op.Slice(keys, first, [END]), [1])  # [S, 1]
    causal = op.LessOrEqual(keys, queries)  # [S, T]
    real = op.Or(real, op.Equal(keys, queries))  # [B, S, T]
    masks = {}
    for window in sorted(windows, key=lambda window: window or math.inf):
        visible = causal
        name = "attention.visible"
        if window is not None:
            own = op.Unsqueeze(op.Slice(counts, first, [END], [1]), [2])  # [B, S, 1]
            visible = op.And(causal, op.Greater(op.Unsqueeze(counts, [1]), op.Sub(own, window)))
            name += f".window_{window}"
        masks[window] = op.And(real, visible, _outputs=[name])
    return masks


def first_slots(op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """T - S: the cache slot of the first new token, ``[1]`` and, the same, for every sequence ``[B]``."""
    first = op.Sub(op.Shape(attention_mask, start=1, end=2), op.Shape(input_ids, start=1, end=2))
    return first, op.Expand(first, op.Shape(input_ids, end=1), _outputs=["attention.start"])


def new_tokens(op: OpBuilder, real: ir.Value, first: ir.Value) -> ir.Value:
    """real ``[B, T]`` -> ``[B, S]``: which of the new tokens are real."""
    return op.Slice(real, first, [END], [1], _outputs=["new_tokens"])


def token_threshold(op: OpBuilder, new: ir.Value, threshold: ir.Value) -> ir.Value:
    """threshold ``[1]`` -> ``[B, S]``: the threshold for real tokens, +inf for padding, which therefore never executes."""
    return op.Where(new, threshold, math.inf, _outputs=["token_threshold"])

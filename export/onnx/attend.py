"""The core of the attention functions: queries of some tokens over the whole cache.

Many queries go in spans, each over those slots alone that some query of it sees. ONNX Runtime's Attention computes every score
that it is given room for, those that the mask takes away as well; and all of a call's scores are in memory at once.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import Inputs, any_of, by_head, either, executed, fork, largest, merge_heads, reference, repeated

QUERIES, KEYS = "num_heads", "kv_num_heads"  # the attributes that count heads
SPAN = 128  # queries; fewer read keys too often, more compute scores of slots that only some of them see

# keys, values [B, K, slots, D], and how many slots are in use (None: all) -> attended [B, W, H D] or [1, n, H D]
Attend = Callable[[OpBuilder, ir.Value, ir.Value, ir.Value | None], ir.Value]


def attends(
    op: OpBuilder, x: Inputs, rows: ir.Value, query: ir.Value, visible: Callable[[OpBuilder, ir.Value], ir.Value]
) -> Attend:
    """Returns how the executed rows' queries ``[1, n, H D]`` attend -> ``[1, n, H D]``.

    One sequence is a batch by itself. Several execute different numbers of tokens: for the attention core alone their
    queries are laid out as ``[B, W]``, W the longest sequence's count. A slot past a sequence's own count repeats row 0, and
    its result is dropped. Attention takes no empty batch, so a call in which nothing executes goes around it.

    Args:
        rows: where they are ``[1, n, 2]``.
        visible: keys -> which slots each token's query sees, bool ``[B, S, T]``.
    """

    def attend(op: OpBuilder, key: ir.Value, value: ir.Value, length: ir.Value | None) -> ir.Value:
        # Each gives queries [B, W, H D], the tokens that they are of [B, W, 2], and where among them the rows are [n, 2].
        def one(op: OpBuilder) -> list[ir.Value]:
            ranks = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(rows, start=1, end=2)), 1), [1])  # [n, 1]
            zeros = op.Sub(ranks, ranks)  # a constant would be copied to the device
            return [op.Identity(query), op.Identity(rows), op.Concat(zeros, ranks, axis=1)]

        def several(op: OpBuilder) -> list[ir.Value]:
            counts = op.ReduceSum(op.Cast(x["execute"], to=ir.DataType.INT64), [1], keepdims=1)  # [B, 1]
            ranks = op.Range(0, op.Squeeze(largest(op, counts, 0)), 1)  # [W]
            used = op.Less(ranks, counts)  # [B, W]
            slots = op.Where(used, op.Add(op.CumSum(counts, 0, exclusive=1), ranks), 0)  # [B, W]: which of the n rows
            tokens, queries = (op.Gather(op.Squeeze(part, [0]), slots) for part in (rows, query))
            return [queries, tokens, executed(op, used)]

        def some(op: OpBuilder) -> ir.Value:
            single = op.Equal(op.Shape(x["execute"], end=1), 1)
            names = ("queries", "tokens", "places")
            queries, tokens, places = fork(op, single, ("one", one), ("several", several), names)
            y = attended(op, queries, key, value, op.GatherND(visible(op, key), tokens), length)
            return op.GatherND(y, op.Unsqueeze(places, [0]))

        def none(op: OpBuilder) -> ir.Value:
            return op.Identity(query)

        return either(op, any_of(op, rows), ("executed", some), ("approximated", none))

    return attend


def attended(
    op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, length: ir.Value | None
) -> ir.Value:
    """Queries ``[B, W, H D]`` over the first ``length`` slots (all, if None), by a mask ``[B, W, T]`` -> ``[B, W, H D]``

    Every query sees some slot. In 16 bits, which are for GPUs, they are never parted: attention keeps no scores there, and every
    span would have to wait for the numbers of its slots.
    """

    def whole(op: OpBuilder) -> ir.Value:
        return _core(op, query, key, value, mask, [0], length)

    def spans(op: OpBuilder) -> ir.Value:
        trips = op.Squeeze(op.Div(op.Add(op.Shape(query, start=1, end=2), SPAN - 1), SPAN))
        return repeated(op, "span", trips, op.Slice(query, [0], [0], [1]), span)

    def span(op: OpBuilder, trip: ir.Value, before: ir.Value) -> ir.Value:
        start = op.Mul(op.Unsqueeze(trip, [0]), SPAN)
        queries, seen = (op.Slice(part, start, op.Add(start, SPAN), [1]) for part in (query, mask))
        slots = op.NonZero(op.ReduceSum(op.Cast(seen, to=ir.DataType.FLOAT), [0, 1], keepdims=0))  # [1, n], rising
        first, last = (op.Gather(op.Squeeze(slots, [0]), place) for place in ([0], [-1]))
        end = op.Add(last, 1)
        y = _core(op, queries, key, value, op.Slice(seen, first, end, [2]), first, end)
        return op.Concat(before, y, axis=1)

    if query.dtype != ir.DataType.FLOAT:
        return whole(op)
    return either(op, op.Greater(op.Shape(query, start=1, end=2), SPAN), ("spans", spans), ("whole", whole))


def _core(
    op: OpBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    first: ir.Value | list[int],
    end: ir.Value | None,
) -> ir.Value:
    """``[B, W, H D]`` -> Attention over the slots from ``first`` to ``end`` (all, if None), by a mask of these -> ``[B, W, H D]``

    Its soft cap comes before the mask, by ONNX Runtime: what is masked stays so.
    """
    if end is not None:
        key, value = (op.Slice(part, first, end, [2]) for part in (key, value))
    mask = op.Unsqueeze(mask, [1])
    if query.dtype != ir.DataType.FLOAT:
        # CUDA's attention that does not keep all scores in memory wants a multiple of 4 slots.
        missing = op.Mod(op.Neg(op.Shape(mask, start=3)), 4)  # [1]
        key, value, mask = (_widened(op, *part, missing) for part in ((key, 2), (value, 2), (mask, 3)))
    scores = {name: reference(name, name, ir.AttributeType.FLOAT) for name in ("scale", "softcap")}
    y = op.Attention(by_head(op, query, QUERIES), key, value, mask, **scores)
    return merge_heads(op, op.Transpose(y, perm=[0, 2, 1, 3]), QUERIES)


def _widened(op: OpBuilder, y: ir.Value, axis: int, by: ir.Value) -> ir.Value:
    """Appends ``by[1]`` zeros along an axis. (Pad has no bfloat16.)"""
    shape = op.Concat(op.Shape(y, end=axis), by, op.Shape(y, start=axis + 1), axis=0)
    return op.Concat(y, op.Expand(op.CastLike(0, y), shape), axis=axis)

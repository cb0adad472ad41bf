"""The bodies of the attention functions."""

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import (
    MICROSOFT,
    Inputs,
    branch,
    contribution,
    count,
    either,
    executed,
    linear,
    merge_heads,
    reference,
    rms_norm,
    split_heads,
)

QUERIES, KEYS = "num_heads", "kv_num_heads"  # the attributes that count heads


def dense(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> k, v -> cache;  h -> q -> (norm) -> rotary -> Attention -> o"""
    query = _rotated(op, x, linear(op, x["h"], x, "q"), "q", x["cos"], x["sin"])
    new = _keys(op, x, linear(op, x["h"], x, "k")), linear(op, x["h"], x, "v")

    def attend(op: OpBuilder, key: ir.Value, value: ir.Value, length: ir.Value | None) -> ir.Value:
        return _core(op, query, key, value, op.Unsqueeze(x["mask"], [1]), length)

    def step(op: OpBuilder) -> list[ir.Value]:
        return _step(op, x, query, *new)

    y, key, value = _cached(op, x, *new, attend, op.Equal(op.Shape(x["h"], start=1, end=2), 1), step)
    return [contribution(op, linear(op, y, x, "o"), x), key, value]


def routed(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> k, v -> cache;  execute -> rows;  h -> GatherND(rows) -> q -> _attend -> o -> ScatterND(forecast, rows)"""
    rows = executed(op, x["execute"])
    query = _queries(op, x, rows, op.GatherND(x["h"], rows))
    new = _keys(op, x, linear(op, x["h"], x, "k")), linear(op, x["h"], x, "v")

    def step(op: OpBuilder) -> list[ir.Value]:
        """Queries that do not execute are 0 here, and their outputs are left behind."""
        shape = op.Concat(op.Shape(x["execute"]), op.Shape(query, start=2), axis=0)
        spread = op.ScatterND(op.Expand(op.CastLike(0.0, query), shape), rows, query)  # [B, 1, H D]
        y, key, value = _step(op, x, spread, *new)
        return [op.GatherND(y, rows), key, value]

    some = op.And(op.Greater(op.Size(rows), 0), op.Equal(op.Shape(x["execute"], start=1), 1))
    y, key, value = _cached(op, x, *new, _attends(op, x, rows, query, lambda op, _: x["mask"]), some, step)
    return [op.ScatterND(x["forecast"], rows, contribution(op, linear(op, y, x, "o"), x)), key, value]


def strict(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> rows;  h -> GatherND(rows) -> k, v -> ScatterND(0, rows) -> cache;  then as _routed_attention"""
    rows = executed(op, x["execute"])
    h = op.GatherND(x["h"], rows)  # [1, n, d]
    query = _queries(op, x, rows, h)

    def project(name: str) -> ir.Value:
        width = op.Mul(count(op, KEYS), count(op, "head_dim"))
        shape = op.Concat(op.Shape(x["execute"]), width, axis=0)
        return op.ScatterND(op.Expand(op.CastLike(0.0, h), shape), rows, linear(op, h, x, name))  # [B, S, K D]

    def visible(op: OpBuilder, key: ir.Value) -> ir.Value:
        kept = op.Greater(op.ReduceMax(op.Abs(key), [1, 3], keepdims=0), op.CastLike(0.0, key))  # [B, slots]
        kept = op.Slice(kept, [0], op.Shape(x["mask"], start=2), [1])  # [B, T]
        return op.And(x["mask"], op.Unsqueeze(kept, [1]))

    # Zero stays zero under the norm and the rotary embedding.
    new = _keys(op, x, project("k")), project("v")
    y, key, value = _cached(op, x, *new, _attends(op, x, rows, query, visible))
    return [op.ScatterND(x["forecast"], rows, contribution(op, linear(op, y, x, "o"), x)), key, value]


def _queries(op: OpBuilder, x: Inputs, rows: ir.Value, h: ir.Value) -> ir.Value:
    """h ``[1, n, d]`` of the executed rows -> q -> (norm) -> rotary -> ``[1, n, H D]``"""
    angles = op.GatherND(x["cos"], rows), op.GatherND(x["sin"], rows)
    return _rotated(op, x, linear(op, h, x, "q"), "q", *angles)


def _keys(op: OpBuilder, x: Inputs, key: ir.Value) -> ir.Value:
    """``[B, S, K D]`` -> (norm) -> rotary"""
    return _rotated(op, x, key, "k", x["cos"], x["sin"])


def _rotated(op: OpBuilder, x: Inputs, y: ir.Value, part: str, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Queries or keys ``[B, S, heads D]`` -> (norm of each head, or of all) -> rotary"""
    heads, norm = {"q": QUERIES, "k": KEYS}[part], x.get(f"{part}_norm")
    if norm is not None:
        y = (
            rms_norm(op, y, norm)
            if x.features.whole_norms
            else merge_heads(op, rms_norm(op, split_heads(op, y, heads), norm), heads)
        )
    return op.RotaryEmbedding(
        y,
        cos,
        sin,
        num_heads=reference("num_heads", heads, ir.AttributeType.INT),
        rotary_embedding_dim=reference("rotary_embedding_dim", "rotary_dim", ir.AttributeType.INT),
    )


def _by_head(op: OpBuilder, y: ir.Value, heads: str) -> ir.Value:
    """``[B, S, heads D]`` -> ``[B, heads, S, D]``"""
    return op.Transpose(split_heads(op, y, heads), perm=[0, 2, 1, 3])


Attend = Callable[[OpBuilder, ir.Value, ir.Value, ir.Value | None], ir.Value]


def _cached(
    op: OpBuilder,
    x: Inputs,
    key: ir.Value,
    value: ir.Value,
    attend: Attend,
    stepping: ir.Value | None = None,
    step: Callable[[OpBuilder], list[ir.Value]] | None = None,
) -> Sequence[ir.Value]:
    """new keys, values ``[B, S, K D]`` -> cache -> attend;  returns attend's output and the whole cache

    A past that has room takes the new tokens at ``start``: in place, where the caller bound past and present to one buffer.
    A past that is full grows by the new tokens. Weights stay outside of these branches: ONNX Runtime packs a weight for the
    one node that reads it, and would leave it unpacked for two.

    Args:
        attend: reads the whole cache, or as many slots of it as it is told.
        stepping, step: where the former is True, the latter does all of it for caches with room.
    """
    pasts = (x["past_key"], key), (x["past_value"], value)
    end = op.Shape(x["mask"], start=2)  # [1]

    def scattered(op: OpBuilder) -> list[ir.Value]:
        keys, values = (op.TensorScatter(past, _by_head(op, new, KEYS), x["start"]) for past, new in pasts)
        return [attend(op, keys, values, end), keys, values]

    def in_place(op: OpBuilder) -> list[ir.Value]:
        if step is None:
            return scattered(op)
        branches = {"then_branch": branch(op, "step", step, 3), "else_branch": branch(op, "scattered", scattered, 3)}
        return op.If(stepping, **branches, _outputs=["attended", "key", "value"])

    def grown(op: OpBuilder) -> list[ir.Value]:
        keys, values = (op.Concat(past, _by_head(op, new, KEYS), axis=2) for past, new in pasts)
        return [attend(op, keys, values, None), keys, values]

    return op.If(
        op.LessOrEqual(end, op.Shape(x["past_key"], start=2, end=3)),
        then_branch=branch(op, "in_place", in_place, 3),
        else_branch=branch(op, "grown", grown, 3),
        _outputs=["attended", "key", "value"],
    )


def _attends(
    op: OpBuilder, x: Inputs, rows: ir.Value, query: ir.Value, visible: Callable[[OpBuilder, ir.Value], ir.Value]
) -> Attend:
    """Returns how the executed rows' queries ``[1, n, H D]`` attend -> ``[1, n, H D]``.

    One sequence is a batch by itself. Several execute different numbers of tokens: for the attention core alone their
    queries are laid out as ``[B, W]``, W the longest sequence's count. A slot past a sequence's own count repeats row 0, and
    its result is dropped. Attention takes no empty batch, so a call in which nothing executes goes around it.
    """

    def attend(op: OpBuilder, key: ir.Value, value: ir.Value, length: ir.Value | None) -> ir.Value:
        def one(op: OpBuilder) -> ir.Value:
            mask = op.Unsqueeze(op.GatherND(visible(op, key), rows), [1])
            return _core(op, query, key, value, mask, length)

        def several(op: OpBuilder) -> ir.Value:
            counts = op.ReduceSum(op.Cast(x["execute"], to=ir.DataType.INT64), [1], keepdims=1)  # [B, 1]
            ranks = op.Range(0, op.ReduceMax(counts, keepdims=0), 1)  # [W]
            used = op.Less(ranks, counts)  # [B, W]
            slots = op.Where(used, op.Add(op.CumSum(counts, 0, exclusive=1), ranks), 0)  # [B, W]: which of the n rows
            places = op.Gather(op.Squeeze(rows, [0]), slots)  # [B, W, 2]
            spread = op.Gather(op.Squeeze(query, [0]), slots)  # [B, W, H D]
            mask = op.Unsqueeze(op.GatherND(visible(op, key), places), [1])
            return op.GatherND(_core(op, spread, key, value, mask, length), executed(op, used))

        def some(op: OpBuilder) -> ir.Value:
            return either(op, op.Equal(op.Shape(x["execute"], end=1), 1), ("one", one), ("several", several))

        def none(op: OpBuilder) -> ir.Value:
            return op.Identity(query)

        return either(op, op.Greater(op.Size(rows), 0), ("executed", some), ("approximated", none))

    return attend


def _core(
    op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, length: ir.Value | None
) -> ir.Value:
    """``[B, H, W, D]`` -> Attention over the first ``length`` slots (all, if None) -> ``[B, W, H D]``

    Its soft cap comes before the mask, by ONNX Runtime: what is masked stays so.
    """
    if length is not None:
        key, value = (op.Slice(part, [0], length, [2]) for part in (key, value))
    scores = {name: reference(name, name, ir.AttributeType.FLOAT) for name in ("scale", "softcap")}
    y = op.Attention(_by_head(op, query, QUERIES), key, value, mask, **scores)
    return merge_heads(op, op.Transpose(y, perm=[0, 2, 1, 3]), QUERIES)


def _step(op: OpBuilder, x: Inputs, query: ir.Value, key: ir.Value, value: ir.Value) -> list[ir.Value]:
    """One new token of each sequence, ``[B, 1, H D]`` -> GroupQueryAttention, which appends to the cache as well

    It reads no slot past the ones in use, and copies none.
    """
    total = op.Cast(op.Shape(x["mask"], start=2), to=ir.DataType.INT32)  # [1]
    last = op.Cast(x["start"], to=ir.DataType.INT32)  # [B]
    hidden = op.CastLike(op.Where(x["mask"], 0.0, -math.inf), query)  # [B, 1, T]
    outputs = op.GroupQueryAttention(
        query,
        key,
        value,
        x["past_key"],
        x["past_value"],
        last,
        total,
        None,
        None,
        None,
        op.Unsqueeze(hidden, [1]),
        num_heads=reference("num_heads", QUERIES, ir.AttributeType.INT),
        kv_num_heads=reference("kv_num_heads", KEYS, ir.AttributeType.INT),
        scale=reference("scale", "scale", ir.AttributeType.FLOAT),
        softcap=reference("softcap", "softcap", ir.AttributeType.FLOAT),
        _domain=MICROSOFT,
        _outputs=["attended", "key", "value"],
    )
    # The operator is not ONNX's own, so the checker cannot infer what it gives.
    for value in outputs:
        value.type = x["past_key"].type
    return list(outputs)

"""The bodies of the attention functions.

A token that is decoded alone goes through as few nodes as can be, for there nodes are what costs: rotary embedding and
GroupQueryAttention where it executes, two TensorScatters where it does not. Everything else is the general case.

Products and norms stay outside of all branches: ONNX Runtime packs a weight for the one node that reads it, and would leave it
unpacked for two.
"""

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import OpBuilder

from .attend import KEYS, QUERIES, Attend, attended, attends
from .body import (
    MICROSOFT,
    Inputs,
    Traces,
    any_of,
    by_head,
    contribution,
    count,
    executed,
    fork,
    linear,
    merge_heads,
    reference,
    rms_norm,
    split_heads,
)


def dense(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> q, k, v -> (norms) -> rotary -> cache -> Attention -> o"""
    query = _rotated(op, x, _queries(op, x, x["h"]), QUERIES, x["cos"], x["sin"])
    new = _keys(op, x, linear(op, x["h"], x, "k")), linear(op, x["h"], x, "v")

    def attend(op: OpBuilder, key: ir.Value, value: ir.Value, length: ir.Value | None) -> ir.Value:
        return attended(op, query, key, value, x["mask"], length)

    def step(op: OpBuilder) -> Sequence[ir.Value]:
        return _step(op, x, query, *new)

    def general(op: OpBuilder) -> Sequence[ir.Value]:
        return _cached(op, x, *new, attend, op.Equal(op.Shape(x["h"], start=1, end=2), 1), step)

    y, key, value = _either(op, x["step"], ("step", step), ("general", general))
    return [contribution(op, linear(op, y, x, "o"), x), key, value]


def routed(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> k, v -> cache;  execute -> rows;  h -> GatherND(rows) -> q -> attend -> o -> ScatterND(forecast, rows)"""
    rows = _rows(op, x["execute"])
    query = _queries(op, x, op.GatherND(x["h"], rows))
    new = _keys(op, x, linear(op, x["h"], x, "k")), linear(op, x["h"], x, "v")
    some = any_of(op, rows)

    def step(op: OpBuilder) -> Sequence[ir.Value]:
        return _step(op, x, _rotated(op, x, query, QUERIES, x["cos"], x["sin"]), *new)

    def passed(op: OpBuilder) -> Sequence[ir.Value]:
        """One token that does not execute: its key and value ``[1, 1, K D]`` -> ``[1, K, 1, D]`` -> cache."""
        shape = op.Concat([0], count(op, KEYS), [1], count(op, "head_dim"), axis=0)
        keys, values = _scattered(op, x, *(op.Reshape(part, shape) for part in new))
        return [op.Identity(query), keys, values]

    def general(op: OpBuilder) -> Sequence[ir.Value]:
        turned = _turned(op, x, rows, query)

        def together(op: OpBuilder) -> Sequence[ir.Value]:
            """Queries that do not execute are 0 here, and their outputs are left behind."""
            shape = op.Concat(op.Shape(x["execute"]), op.Shape(turned, start=2), axis=0)
            spread = op.ScatterND(op.Expand(op.CastLike(0.0, turned), shape), rows, turned)  # [B, 1, H D]
            y, key, value = _step(op, x, spread, *new)
            return [op.GatherND(y, rows), key, value]

        attend = attends(op, x, rows, turned, lambda op, _: x["mask"])
        stepping = op.And(any_of(op, rows), op.Equal(op.Shape(x["execute"], start=1), 1))
        return _cached(op, x, *new, attend, stepping, together)

    def others(op: OpBuilder) -> Sequence[ir.Value]:
        return _either(op, x["step"], ("passed", passed), ("general", general))

    y, key, value = _either(op, op.And(x["step"], some), ("step", step), ("others", others))
    return [op.ScatterND(x["forecast"], rows, contribution(op, linear(op, y, x, "o"), x)), key, value]


def strict(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> rows;  h -> GatherND(rows) -> k, v -> ScatterND(0, rows) -> cache;  then as ``routed``, always the general case"""
    rows = _rows(op, x["execute"])
    h = op.GatherND(x["h"], rows)  # [1, n, d]
    query = _turned(op, x, rows, _queries(op, x, h))

    def project(name: str) -> ir.Value:
        width = op.Mul(count(op, KEYS), count(op, "head_dim"))
        shape = op.Concat(op.Shape(x["execute"]), width, axis=0)
        return op.ScatterND(op.Expand(op.CastLike(0.0, h), shape), rows, linear(op, h, x, name))  # [B, S, K D]

    def visible(op: OpBuilder, key: ir.Value) -> ir.Value:
        sums = op.Transpose(op.ReduceSum(op.Abs(key), [3], keepdims=0), perm=[0, 2, 1])  # [B, slots, K]
        # Along the last axis only, for else a GPU would need cuDNN.
        kept = op.Cast(op.ReduceSum(sums, [2], keepdims=0), to=ir.DataType.BOOL)  # [B, slots]
        kept = op.Slice(kept, [0], op.Shape(x["mask"], start=2), [1])  # [B, T]
        return op.And(x["mask"], op.Unsqueeze(kept, [1]))

    # Zero stays zero under the norm and the rotary embedding.
    new = _keys(op, x, project("k")), project("v")
    y, key, value = _cached(op, x, *new, attends(op, x, rows, query, visible))
    return [op.ScatterND(x["forecast"], rows, contribution(op, linear(op, y, x, "o"), x)), key, value]


def _rows(op: OpBuilder, flags: ir.Value) -> ir.Value:
    """bool ``[B, S]`` -> the (sequence, place) of every True ``[1, n, 2]``: what it gathers is one sequence of n tokens."""
    return op.Unsqueeze(executed(op, flags), [0])


def _queries(op: OpBuilder, x: Inputs, h: ir.Value) -> ir.Value:
    """h ``[B, S, d]`` -> q -> (norm) -> ``[B, S, H D]``"""
    return _normed(op, x, linear(op, h, x, "q"), "q_norm", QUERIES)


def _keys(op: OpBuilder, x: Inputs, key: ir.Value) -> ir.Value:
    """``[B, S, K D]`` -> (norm) -> rotary"""
    return _rotated(op, x, _normed(op, x, key, "k_norm", KEYS), KEYS, x["cos"], x["sin"])


def _normed(op: OpBuilder, x: Inputs, y: ir.Value, name: str, heads: str) -> ir.Value:
    """``[B, S, heads D]`` -> (norm of each head, or of all)"""
    norm = x.get(name)
    if norm is None or x.features.whole_norms:
        return rms_norm(op, y, norm)
    return merge_heads(op, rms_norm(op, split_heads(op, y, heads), norm), heads)


def _rotated(op: OpBuilder, x: Inputs, y: ir.Value, heads: str, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Queries or keys ``[B, S, heads D]`` -> rotary"""
    return op.RotaryEmbedding(
        y,
        cos,
        sin,
        num_heads=reference("num_heads", heads, ir.AttributeType.INT),
        rotary_embedding_dim=reference("rotary_embedding_dim", "rotary_dim", ir.AttributeType.INT),
    )


def _turned(op: OpBuilder, x: Inputs, rows: ir.Value, query: ir.Value) -> ir.Value:
    """The executed rows' queries ``[1, n, H D]`` -> rotary, each by its own place"""
    return _rotated(op, x, query, QUERIES, op.GatherND(x["cos"], rows), op.GatherND(x["sin"], rows))


def _either(
    op: OpBuilder, condition: ir.Value, then: tuple[str, Traces], otherwise: tuple[str, Traces]
) -> Sequence[ir.Value]:
    """An If whose branches give attended ``[B, W, H D]`` or ``[1, n, H D]``, and the whole cache's keys and values."""
    return fork(op, condition, then, otherwise, ("attended", "key", "value"))


def _scattered(op: OpBuilder, x: Inputs, *new: ir.Value) -> list[ir.Value]:
    """New keys and values ``[B, K, S, D]`` -> cache, from start on"""
    start = op.Cast(x["start"], to=ir.DataType.INT64)
    return [op.TensorScatter(x[f"past_{part}"], y, start) for part, y in zip(("key", "value"), new, strict=True)]


def _cached(
    op: OpBuilder,
    x: Inputs,
    key: ir.Value,
    value: ir.Value,
    attend: Attend,
    stepping: ir.Value | None = None,
    step: Traces | None = None,
) -> Sequence[ir.Value]:
    """new keys, values ``[B, S, K D]`` -> cache -> attend;  returns attend's output and the whole cache

    A past that has room takes the new tokens at ``start``: in place, where the caller bound past and present to one buffer.
    A past that is full grows by the new tokens.

    Args:
        attend: reads the whole cache, or as many slots of it as it is told.
        stepping, step: where the former is True, the latter does all of it for caches with room.
    """
    end = op.Shape(x["mask"], start=2)  # [1]

    def scattered(op: OpBuilder) -> Sequence[ir.Value]:
        keys, values = _scattered(op, x, *(by_head(op, new, KEYS) for new in (key, value)))
        return [attend(op, keys, values, end), keys, values]

    def in_place(op: OpBuilder) -> Sequence[ir.Value]:
        if stepping is None or step is None:
            return scattered(op)
        return _either(op, stepping, ("step", step), ("scattered", scattered))

    def grown(op: OpBuilder) -> Sequence[ir.Value]:
        pasts = (x["past_key"], key), (x["past_value"], value)
        keys, values = (op.Concat(past, by_head(op, new, KEYS), axis=2) for past, new in pasts)
        return [attend(op, keys, values, None), keys, values]

    room = op.LessOrEqual(end, op.Shape(x["past_key"], start=2, end=3))
    return _either(op, room, ("in_place", in_place), ("grown", grown))


def _step(op: OpBuilder, x: Inputs, query: ir.Value, key: ir.Value, value: ir.Value) -> list[ir.Value]:
    """One new token of each sequence, ``[B, 1, H D]`` -> GroupQueryAttention, which appends to the cache as well

    It reads no slot past the ones in use, and copies none.
    """
    outputs = op.GroupQueryAttention(
        query,
        key,
        value,
        x["past_key"],
        x["past_value"],
        x["start"],
        x["total"],
        None,
        None,
        None,
        x["step_bias"],
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

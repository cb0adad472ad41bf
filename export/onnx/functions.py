"""A layer's units as ONNX functions, routed and plain: what a unit does with a decision, in standard operators.

    output[b, s] = unit(h)[b, s]  where execute[b, s],  else forecast[b, s]

Only executed tokens enter the matrix products that routing saves: one index of executed rows, ``rows``, is shared by all
gathers of a unit and by the scatter that merges its output into the forecast. Keys and values are computed for every
token; with a strict KV cache for executed tokens only. A plain unit takes neither forecast nor execute.

The signatures are stable: a native library may register kernels under the same names (domain ``ir``), which then replace
these bodies. Every call passes the inputs in the order of ``ATTENTION_INPUTS`` or ``MLP_INPUTS``; an optional input that a
model lacks is an empty name, and the body is built without it. Weights are ``[in, out]``.
"""

from collections.abc import Callable, Collection
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from .names import tidy

DOMAIN, VERSION, OPSET = "ir", 1, 23

MLP_INPUTS = (
    "h",
    "forecast",
    "execute",
    "gate_weight",
    "up_weight",
    "down_weight",
    "gate_bias",
    "up_bias",
    "down_bias",
)
ATTENTION_INPUTS = (
    *("h", "forecast", "execute", "cos", "sin", "mask", "past_key", "past_value"),
    *("q_weight", "k_weight", "v_weight", "o_weight", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"),
)
ROUTING = ("forecast", "execute")  # the inputs that a plain unit is without
OPTIONAL = frozenset(name for name in MLP_INPUTS + ATTENTION_INPUTS if name.endswith(("_bias", "_norm")))

Inputs = dict[str, Any]  # ir.Value by name; None where an optional input is absent


def mlp(optional: Collection[str] = (), routed: bool = True) -> ir.Function:
    """Builds ``ir.RoutedMLP``, or ``ir.DenseMLP``.

    Inputs (``MLP_INPUTS``), S tokens in each of B sequences, T a float type:
        h ``T[B, S, d]``: normalised hidden states. forecast ``T[B, S, d]``. execute ``bool[B, S]``.
        gate_weight, up_weight ``T[d, f]``, down_weight ``T[f, d]``; optional gate_bias, up_bias ``T[f]``, down_bias ``T[d]``.
    Output: output ``T[B, S, d]``. No attributes.

    Args:
        optional: the optional inputs that every call provides.
        routed: whether tokens are chosen; if not, forecast and execute are no inputs.
    """
    name, body, doc = ("RoutedMLP", _routed_mlp, _ROUTED_MLP) if routed else ("DenseMLP", _dense_mlp, _DENSE_MLP)
    return _function(name, body, _inputs(MLP_INPUTS, routed), ("output",), optional, [], doc)


def attention(optional: Collection[str] = (), routed: bool = True, kv_cache: str = "full") -> ir.Function:
    """Builds ``ir.RoutedAttention``, ``ir.RoutedAttentionStrict`` or ``ir.DenseAttention``.

    Inputs (``ATTENTION_INPUTS``), S new tokens after P cached ones in each of B sequences, H query heads, K key/value heads
    of width D, T a float type:
        h ``T[B, S, d]``: normalised hidden states. forecast ``T[B, S, d]``. execute ``bool[B, S]``.
        cos, sin ``T[B, S, D / 2]``: rotary embedding of each new token.
        mask ``bool[B, S, P + S]``: True where a query sees a key; every query sees some.
        past_key, past_value ``T[B, K, P, D]``.
        q_weight ``T[d, H D]``, k_weight, v_weight ``T[d, K D]``, o_weight ``T[H D, d]``; optional biases; optional q_norm,
        k_norm ``T[D]``: RMS norm of each head before the rotary embedding.
    Outputs: output ``T[B, S, d]``; present_key, present_value ``T[B, K, P + S, D]``.
    Attributes: num_heads, kv_num_heads (int); scale (float) of the scores; epsilon (float) of q_norm and k_norm.

    Strict: an approximated token's keys and values are exactly zero, and a token whose key is zero in every head is seen by
    no query. So the cache itself says who is in it, in the shape that every runtime expects.

    Args:
        optional: the optional inputs that every call provides.
        routed: whether tokens are chosen; if not, forecast and execute are no inputs.
        kv_cache: of a routed unit: ``full``, keys and values for every token, or ``strict``, for executed tokens only.
    """
    if not routed:
        name, body, doc = "DenseAttention", _dense_attention, _DENSE_ATTENTION
    elif kv_cache == "strict":
        name, body, doc = "RoutedAttentionStrict", _strict_attention, _STRICT_ATTENTION
    else:
        name, body, doc = "RoutedAttention", _routed_attention, _ROUTED_ATTENTION
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("kv_num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
        ir.Attr("epsilon", ir.AttributeType.FLOAT, None),
    ]
    outputs = ("output", "present_key", "present_value")
    return _function(name, body, _inputs(ATTENTION_INPUTS, routed), outputs, optional, attributes, doc)


_DENSE_MLP = "output = down(silu(gate(h)) * up(h))."
_ROUTED_MLP = """\
output = down(silu(gate(h)) * up(h)) where execute, forecast elsewhere.
Only the executed tokens' rows of h enter the products."""
_DENSE_ATTENTION = """\
k, v = key(h), value(h), appended to the cache;
output = o(softmax(scale * q(h) k^T where mask) v)."""
_ROUTED_ATTENTION = """\
k, v = key(h), value(h), appended to the cache for every token;
output = o(softmax(scale * q(h) k^T where mask) v) where execute, forecast elsewhere.
Only the executed tokens' rows of h enter q, the scores and o."""
_STRICT_ATTENTION = """\
k, v = key(h), value(h) where execute, zero elsewhere, appended to the cache;
output = o(softmax(scale * q(h) k^T where mask and k is not zero) v) where execute, forecast elsewhere.
Only the executed tokens' rows of h enter q, k, v, the scores and o."""


def _dense_mlp(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> gate, up -> silu * -> down"""
    return [_gated(op, x["h"], x)]


def _routed_mlp(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> NonZero -> rows;  h -> GatherND(rows) -> gate, up -> silu * -> down -> ScatterND(forecast, rows)"""
    rows = _executed(op, x["execute"])  # [n, 2]
    return [op.ScatterND(x["forecast"], rows, _gated(op, op.GatherND(x["h"], rows), x))]


def _gated(op: OpBuilder, h: ir.Value, x: Inputs) -> ir.Value:
    """``[..., d]`` -> ``[..., d]``"""
    gate, up = _linear(op, h, x, "gate"), _linear(op, h, x, "up")  # [..., f]
    return _linear(op, op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), x, "down")


def _dense_attention(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> k, v -> present;  h -> q -> (norm) -> rotary -> Attention -> o"""
    key, value = _append(op, x, _linear(op, x["h"], x, "k"), _linear(op, x["h"], x, "v"))
    query = _heads(op, _linear(op, x["h"], x, "q"), [0, 0], "num_heads", [-1])
    query = op.Transpose(_norm(op, query, x["q_norm"]), perm=[0, 2, 1, 3])  # [B, H, S, D]
    query = op.RotaryEmbedding(query, x["cos"], x["sin"])
    y = _core(op, query, key, value, op.Unsqueeze(x["mask"], [1]))  # [B, S, H, D]
    return [_linear(op, op.Reshape(y, [0, 0, -1]), x, "o"), key, value]


def _routed_attention(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> k, v -> present;  If(any executed): _attend, else: forecast"""
    key, value = _append(op, x, _linear(op, x["h"], x, "k"), _linear(op, x["h"], x, "v"))
    rows = _executed(op, x["execute"])  # [n, 2]
    return [_if_any(op, x, rows, lambda op: _attend(op, x, rows, key, value, x["mask"])), key, value]


def _strict_attention(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> rows;  h -> GatherND(rows) -> k, v -> ScatterND(0, rows) -> present;  as _routed_attention"""
    rows = _executed(op, x["execute"])  # [n, 2]
    h = op.GatherND(x["h"], rows)  # [n, d]

    def project(name: str) -> ir.Value:
        shape = op.Concat(op.Shape(x["execute"]), op.Shape(x[f"{name}_weight"], start=1), axis=0)
        return op.ScatterND(op.Expand(op.CastLike(0.0, h), shape), rows, _linear(op, h, x, name))  # [B, S, K D]

    # Zero stays zero under the norm and the rotary embedding.
    key, value = _append(op, x, project("k"), project("v"))

    def attend(op: OpBuilder) -> ir.Value:
        kept = op.Greater(op.ReduceMax(op.Abs(key), [1, 3], keepdims=0), op.CastLike(0.0, key))  # [B, P + S]
        return _attend(op, x, rows, key, value, op.And(x["mask"], op.Unsqueeze(kept, [1])))

    return [_if_any(op, x, rows, attend), key, value]


def _append(op: OpBuilder, x: Inputs, key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """k, v ``[B, S, K D]`` -> (norm) -> rotary of k -> Concat(past): both ``[B, K, P + S, D]``"""
    key = _heads(op, key, [0, 0], "kv_num_heads", [-1])  # [B, S, K, D]
    key = op.Transpose(_norm(op, key, x["k_norm"]), perm=[0, 2, 1, 3])  # [B, K, S, D]
    value = op.Transpose(_heads(op, value, [0, 0], "kv_num_heads", [-1]), perm=[0, 2, 1, 3])
    key = op.RotaryEmbedding(key, x["cos"], x["sin"])
    return op.Concat(x["past_key"], key, axis=2), op.Concat(x["past_value"], value, axis=2)


def _if_any(op: OpBuilder, x: Inputs, rows: ir.Value, attend: Callable[[OpBuilder], ir.Value]) -> ir.Value:
    """Attention takes no empty batch, so a step in which nothing executes goes around it."""
    return op.If(
        op.Greater(op.Shape(rows, end=1), 0),
        then_branch=_branch(op, "executed", attend),
        else_branch=_branch(op, "approximated", lambda op: op.Identity(x["forecast"])),
    )


def _attend(op: OpBuilder, x: Inputs, rows: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
    """h -> GatherND(rows) -> q -> (norm) -> rotary -> Gather(slots) -> Attention -> GatherND(used) -> o -> ScatterND

    Sequences execute different numbers of tokens. The products run on exactly the n executed rows; only for the attention
    core are these laid out as ``[B, W]``, W the longest sequence's count. A slot past a sequence's own count repeats row 0,
    and its result is dropped.
    """
    query = _linear(op, op.GatherND(x["h"], rows), x, "q")  # [n, H D]
    query = _norm(op, _heads(op, query, [0], "num_heads", [1, -1]), x["q_norm"])  # [n, H, 1, D]
    query = op.RotaryEmbedding(query, *(op.Unsqueeze(op.GatherND(x[part], rows), [1]) for part in ("cos", "sin")))

    counts = op.ReduceSum(op.Cast(x["execute"], to=ir.DataType.INT64), [1], keepdims=1)  # [B, 1]
    ranks = op.Range(0, op.ReduceMax(counts, keepdims=0), 1)  # [W]
    used = op.Less(ranks, counts)  # [B, W]
    slots = op.Where(used, op.Add(op.CumSum(counts, 0, exclusive=1), ranks), 0)  # [B, W]: which of the n rows

    query = op.Transpose(op.Squeeze(op.Gather(query, slots), [3]), perm=[0, 2, 1, 3])  # [B, H, W, D]
    mask = op.Unsqueeze(op.GatherND(mask, op.Gather(rows, slots)), [1])  # [B, 1, W, P + S]
    y = op.GatherND(_core(op, query, key, value, mask), _executed(op, used))  # [n, H, D]
    return op.ScatterND(x["forecast"], rows, _linear(op, op.Reshape(y, [0, -1]), x, "o"))


def _core(op: OpBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
    """``[B, H, W, D]`` -> Attention -> ``[B, W, H, D]``"""
    y = op.Attention(query, key, value, mask, scale=_reference("scale", "scale", ir.AttributeType.FLOAT))
    return op.Transpose(y, perm=[0, 2, 1, 3])


def _executed(op: OpBuilder, flags: ir.Value | None) -> ir.Value:
    """bool ``[B, S]`` -> the (sequence, place) of every True, in order ``[n, 2]``."""
    return op.Transpose(op.NonZero(flags), perm=[1, 0])


def _linear(op: OpBuilder, x: ir.Value, inputs: Inputs, name: str) -> ir.Value:
    y, bias = op.MatMul(x, inputs[f"{name}_weight"]), inputs[f"{name}_bias"]
    return y if bias is None else op.Add(y, bias)


def _norm(op: OpBuilder, x: ir.Value, weight: ir.Value | None) -> ir.Value:
    if weight is None:
        return x
    return op.RMSNormalization(x, weight, epsilon=_reference("epsilon", "epsilon", ir.AttributeType.FLOAT))


def _heads(op: OpBuilder, x: ir.Value, before: list[int], heads: str, after: list[int]) -> ir.Value:
    """Splits the last axis into heads: reshapes to ``[*before, the attribute heads, *after]``."""
    count = op.Constant(value_int=_reference("value_int", heads, ir.AttributeType.INT))
    count.type = ir.TensorType(ir.DataType.INT64)
    return op.Reshape(x, op.Concat(before, op.Unsqueeze(count, [0]), after, axis=0))


def _branch(op: OpBuilder, name: str, trace: Callable[[OpBuilder], ir.Value]) -> ir.Graph:
    """Traces one branch of an If; it sees the values around it."""

    def scoped(inner: OpBuilder) -> ir.Value:
        inner.builder.push_module(name)
        return trace(inner)

    return op.builder.subgraph(scoped, [], [ir.Value(name="")], name=name)


def _reference(name: str, attribute: str, kind: ir.AttributeType) -> ir.Attr:
    """A node attribute that takes the value of the function's attribute."""
    return ir.RefAttr(name, attribute, kind)


def _inputs(names: tuple[str, ...], routed: bool) -> tuple[str, ...]:
    return names if routed else tuple(name for name in names if name not in ROUTING)


def _function(
    name: str,
    trace: Callable[[OpBuilder, Inputs], list[ir.Value]],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    optional: Collection[str],
    attributes: list[ir.Attr],
    doc: str,
) -> ir.Function:
    absent = {name for name in inputs if name in OPTIONAL and name not in optional}
    # The types of the two masks are the same at every precision; the others stay open.
    values = {name: ir.Value(name=name) for name in inputs}
    for mask in {"execute", "mask"} & set(inputs):
        values[mask].type = ir.TensorType(ir.DataType.BOOL)
    function = build_function(
        lambda op, *_: trace(op, {name: None if name in absent else value for name, value in values.items()}),
        list(values.values()),
        domain=DOMAIN,
        name=name,
        attributes=attributes,
        opset_imports={"": OPSET},
    )
    tidy(function)
    for value, output in zip(function.outputs, outputs, strict=True):
        value.name = output
    function.doc_string = doc
    return function

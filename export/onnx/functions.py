"""A layer's units as ONNX functions, routed and plain: the decision, and what a unit does with it, in standard operators.

    forecast, execute = Decide(h)
    output[b, s] = unit(h)[b, s]  where execute[b, s],  else forecast[b, s]

Only executed tokens enter the matrix products that routing saves: one index of executed rows, ``rows``, is shared by all
gathers of a unit and by the scatter that merges its output into the forecast. Keys and values are computed for every
token; with a strict KV cache for executed tokens only. A plain unit takes neither forecast nor execute.

The signatures are stable: a native library may register kernels under the same names (domain ``ir``), which then replace
these bodies. Every call passes the inputs in the order of ``DECIDE_INPUTS``, ``ATTENTION_INPUTS``, ``MLP_INPUTS`` or
``MOE_INPUTS``; an optional input that a model lacks is an empty name, and the body is built without it. So it is with an
attribute that has its default.
Weights are ``[in, out]``.

What follows a unit before its output is added to the stream belongs to it, for the forecast is of all that is added: optional
post_norm ``F[d]``, an RMS norm, then a factor, the attribute residual_multiplier (float, default 1).

In the domain ``ir.int4`` are the same functions for weights in int4, a domain of its own so that a library without kernels for
them leaves them to ONNX Runtime. There ``*_weight`` is MatMulNBits' uint8 ``[out, blocks, 16]``, and after the inputs above come
each projection's ``*_scales`` ``F[out, blocks]``, then, but for Decide, each one's optional ``*_zero_points``; see ``int4.py``.
Of a mixture those of all experts are one tensor, as QMoE takes them: ``experts.py``; what scores the experts is not in int4.
"""

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from . import attention as attention_bodies
from . import decide as decide_bodies
from . import mlp as mlp_bodies
from . import moe as moe_bodies
from .body import MICROSOFT, PLAIN, Features, Inputs
from .experts import MOE_PROJECTIONS
from .int4 import Int4
from .names import tidy

DOMAIN, INT4_DOMAIN, VERSION, OPSET = "ir", "ir.int4", 1, 24
OPSETS = {"": OPSET, MICROSOFT: 1}  # what the bodies are written in

DECIDE_INPUTS = (
    *("h", "threshold", "down_weight", "down_bias", "up_weight", "up_bias"),
    *("hidden_weight", "hidden_bias", "out_weight", "out_bias"),
)
DECIDE_PROJECTIONS = ("down", "up", "hidden")
MLP_PROJECTIONS, ATTENTION_PROJECTIONS = ("gate", "up", "down"), ("q", "k", "v", "o")
MLP_INPUTS = (
    *("h", "forecast", "execute", "gate_weight", "up_weight", "down_weight"),
    *("gate_bias", "up_bias", "down_bias", "post_norm"),
)
MOE_INPUTS = ("h", "forecast", "execute", "gate_weight", "gate_up_weight", "down_weight", "post_norm")
ATTENTION_INPUTS = (
    *("h", "forecast", "execute", "cos", "sin", "mask", "step_bias", "start", "total", "step"),
    *("past_key", "past_value"),
    *("q_weight", "k_weight", "v_weight", "o_weight", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"),
    "post_norm",
)
ROUTING = ("forecast", "execute")  # the inputs that a plain unit is without
OPTIONAL, NEEDED = ("_bias", "_norm", "_zero_points"), "step_bias"  # how the names of optional inputs end, but for one
# The types that are the same at every precision.
BOOL, INT32, FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.FLOAT
TYPES = {"execute": BOOL, "mask": BOOL, "start": INT32, "total": INT32, "step": BOOL}
TYPES |= dict.fromkeys(("threshold", "hidden_weight", "hidden_bias", "out_weight", "out_bias"), FLOAT)

Body = Callable[[OpBuilder, Inputs], list[ir.Value]]
Int4Attributes = Mapping[str, Mapping[str, int]]  # of MatMulNBits or QMoE, by projection


def decide(forecasts: bool = True, dtype: ir.DataType = FLOAT, int4: Int4 | None = None) -> ir.Function:
    """Builds ``Decide``: what a routed unit's tokens get if they do not execute, and whether they do.

    Inputs (``DECIDE_INPUTS``), S tokens in each of B sequences, F a float type, r a forecaster's rank, w a router's width:
        h ``F[B, S, d]``: what the unit sees. threshold ``float32[B, S]``, of every token.
        down_weight ``F[d, r]``, down_bias ``F[r]``, up_weight ``F[r, d]``: all or none; up_bias ``F[d]``.
        hidden_weight ``float32[d, w]``, hidden_bias, out_weight ``float32[w]``, out_bias ``float32[1]``.
    Outputs: forecast ``F[B, S, d]``, of tokens that do not execute: another's is not read, and a native kernel may leave it 0;
    execute ``bool[B, S]``; score ``float32[B, S]``.

    The router is float32 at every precision: its scores are compared with a threshold that was measured in float32. But with
    int4 both are in int4, which moves scores and forecasts by less than either is off by itself (docs/calibration.md). Then
    attributes give the sizes: hidden_size d, rank r, codes r + w + 1 (int).

    Args:
        forecasts: whether there is a forecaster; if not, its rank is 0: up_bias is the forecast for every token.
        dtype: F.
        int4: makes it a function for weights in int4, symmetric ones; of float32 and with a forecaster alone.
    """
    optional = ["up_bias", "hidden_bias", "out_bias"] + ["down_bias"] * forecasts
    outputs = ("forecast", "execute", "score")
    body, doc = (decide_bodies.ranked, _DECIDE) if forecasts else (decide_bodies.constant, _DECIDE_CONSTANT)
    inputs: tuple[str, ...] = DECIDE_INPUTS
    attributes, settings = [], None
    if int4 is not None:
        body = decide_bodies.quantised
        inputs += tuple(f"{name}_scales" for name in DECIDE_PROJECTIONS)
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("hidden_size", "rank", "codes")]
        settings = dict.fromkeys(DECIDE_PROJECTIONS, int4.settings)
    return _function("Decide", body, inputs, outputs, optional, attributes, doc, dtype, settings, PLAIN)


def mlp(
    optional: Collection[str] = (),
    routed: bool = True,
    dtype: ir.DataType = ir.DataType.FLOAT,
    int4: Int4Attributes | None = None,
    features: Features = PLAIN,
) -> ir.Function:
    """Builds ``RoutedMLP``, or ``DenseMLP``.

    Inputs (``MLP_INPUTS``), S tokens in each of B sequences, F a float type:
        h ``F[B, S, d]``: what the unit sees. forecast ``F[B, S, d]``. execute ``bool[B, S]``.
        gate_weight, up_weight ``F[d, f]``, down_weight ``F[f, d]``; optional gate_bias, up_bias ``F[f]``, down_bias, post_norm
        ``F[d]``.
    Output: output ``F[B, S, d]``.
    Attributes: activation (string, default ``silu``; or ``gelu_pytorch_tanh``); epsilon (float) of post_norm;
    residual_multiplier.

    Args:
        optional: the optional inputs that every call provides.
        routed: whether tokens are chosen; if not, forecast and execute are no inputs.
        dtype: F.
        int4: makes it a function for weights in int4.
        features: what else the unit does; attributes say it as well.
    """
    name, body, doc = (
        ("RoutedMLP", mlp_bodies.routed, _ROUTED_MLP) if routed else ("DenseMLP", mlp_bodies.dense, _DENSE_MLP)
    )
    inputs = _inputs(MLP_INPUTS, MLP_PROJECTIONS, routed, int4)
    attributes = [ir.Attr("activation", ir.AttributeType.STRING, "silu"), *_CONTRIBUTION]
    return _function(name, body, inputs, ("output",), optional, attributes, doc, dtype, int4, features)


def moe(
    optional: Collection[str] = (),
    routed: bool = True,
    dtype: ir.DataType = ir.DataType.FLOAT,
    int4: Int4Attributes | None = None,
    features: Features = PLAIN,
) -> ir.Function:
    """Builds ``RoutedMoE``, or ``DenseMoE``: an MLP that is a mixture of E experts, on com.microsoft's MoE or QMoE.

    Inputs (``MOE_INPUTS``), S tokens in each of B sequences, F a float type:
        h ``F[B, S, d]``: what the unit sees. forecast ``F[B, S, d]``. execute ``bool[B, S]``.
        gate_weight ``F[d, E]``: scores the experts. gate_up_weight ``F[E, 2 f, d]``: the rows of each expert's gate and up by
        turns. down_weight ``F[E, d, f]``. Optional post_norm ``F[d]``.
    Output: output ``F[B, S, d]``.
    Attributes: experts_per_token (int); normalize (int): whether the weights of a token's experts, their share of the softmax
    over all, are made to add up to 1; epsilon (float) of post_norm; residual_multiplier.

    Args:
        optional: the optional inputs that every call provides.
        routed: whether tokens are chosen; if not, forecast and execute are no inputs.
        dtype: F.
        int4: makes it a function for experts in int4.
        features: what else the unit does; attributes say it as well.
    """
    name, body, doc = (
        ("RoutedMoE", moe_bodies.routed, _ROUTED_MOE) if routed else ("DenseMoE", moe_bodies.dense, _DENSE_MOE)
    )
    attributes = [
        ir.Attr("experts_per_token", ir.AttributeType.INT, None),
        ir.Attr("normalize", ir.AttributeType.INT, None),
        *_CONTRIBUTION,
    ]
    inputs = _inputs(MOE_INPUTS, MOE_PROJECTIONS, routed, int4)
    return _function(name, body, inputs, ("output",), optional, attributes, doc, dtype, int4, features)


def attention(
    optional: Collection[str] = (),
    routed: bool = True,
    kv_cache: str = "full",
    dtype: ir.DataType = ir.DataType.FLOAT,
    int4: Int4Attributes | None = None,
    features: Features = PLAIN,
) -> ir.Function:
    """Builds ``RoutedAttention``, ``RoutedAttentionStrict`` or ``DenseAttention``.

    Inputs (``ATTENTION_INPUTS``), S new tokens in each of B sequences, H query heads, K key/value heads
    of width D, F a float type:
        h ``F[B, S, d]``: what the unit sees. forecast ``F[B, S, d]``. execute ``bool[B, S]``.
        cos, sin ``F[B, S, R / 2]``: rotary embedding of each new token, of the first R of a head's D components.
        mask ``bool[B, S, T]``: True where a query sees a slot of the cache; every query sees some. T slots are in use.
        step_bias ``F[B, 1, 1, T]``: the last new token's row of the mask, in numbers to add to scores: 0 or -inf.
        start ``int32[B]``: the slot of the first new token, T - S, in every sequence. total ``int32[1]``: T.
        step ``bool[1]``: whether the call appends one token of one sequence to caches with room, B = S = 1 and P >= T.
        past_key, past_value ``F[B, K, P, D]``: P = T - S, and the present has T slots; or P >= T, and the present has P, of
        which those from start on are written: in place, where the caller binds past and present to one buffer.
        q_weight ``F[d, H D]``, k_weight, v_weight ``F[d, K D]``, o_weight ``F[H D, d]``; optional biases; optional q_norm,
        k_norm ``F[D]``: RMS norm of each head before the rotary embedding; or ``F[H D]``, ``F[K D]``: of all heads together.
        Optional post_norm ``F[d]``.
    Outputs: output ``F[B, S, d]``; present_key, present_value ``F[B, K, max(P, T), D]``.
    Attributes: num_heads, kv_num_heads, head_dim (int); scale (float) of the scores; epsilon (float) of all norms; softcap
    (float, default 0: none): c, where scaled scores become c tanh(score / c), before the mask; rotary_dim (int, default 0: R is
    D): R; residual_multiplier.

    Strict: an approximated token's keys and values are exactly zero, and a token whose key is zero in every head is seen by
    no query. So the cache itself says who is in it, in the shape that every runtime expects.

    Args:
        optional: the optional inputs that every call provides.
        routed: whether tokens are chosen; if not, forecast and execute are no inputs.
        kv_cache: of a routed unit: ``full``, keys and values for every token, or ``strict``, for executed tokens only.
        dtype: F.
        int4: makes it a function for weights in int4.
        features: what else the unit does; inputs' shapes and attributes say it as well.
    """
    if not routed:
        name, body, doc = "DenseAttention", attention_bodies.dense, _DENSE_ATTENTION
    elif kv_cache == "strict":
        name, body, doc = "RoutedAttentionStrict", attention_bodies.strict, _STRICT_ATTENTION
    else:
        name, body, doc = "RoutedAttention", attention_bodies.routed, _ROUTED_ATTENTION
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("kv_num_heads", ir.AttributeType.INT, None),
        ir.Attr("head_dim", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
        ir.Attr("softcap", ir.AttributeType.FLOAT, 0.0),
        ir.Attr("rotary_dim", ir.AttributeType.INT, 0),
        *_CONTRIBUTION,
    ]
    outputs = ("output", "present_key", "present_value")
    inputs = _inputs(ATTENTION_INPUTS, ATTENTION_PROJECTIONS, routed, int4)
    return _function(name, body, inputs, outputs, optional, attributes, doc, dtype, int4, features)


_CONTRIBUTION = (
    ir.Attr("epsilon", ir.AttributeType.FLOAT, 1e-5),
    ir.Attr("residual_multiplier", ir.AttributeType.FLOAT, 1.0),
)
_SCORE = """\
score = out(silu(hidden(h))), in float32;
execute = score > threshold."""
_DECIDE = f"forecast = up(silu(down(h)));\n{_SCORE}"
_DECIDE_CONSTANT = f"forecast = up_bias;\n{_SCORE}"
_DENSE_MLP = "output = residual_multiplier * post_norm(down(activation(gate(h)) * up(h)))."
_ROUTED_MLP = """\
output = residual_multiplier * post_norm(down(activation(gate(h)) * up(h))) where execute, forecast elsewhere.
Only the executed tokens' rows of h enter the products."""
_DENSE_MOE = "output = residual_multiplier * post_norm(sum of weight * expert(h) over the best experts by gate(h))."
_ROUTED_MOE = """\
output = residual_multiplier * post_norm(sum of weight * expert(h) over the best experts by gate(h)) where execute, forecast
elsewhere.
Only the executed tokens' rows of h enter the products."""
_DENSE_ATTENTION = """\
k, v = key(h), value(h), appended to the cache;
output = residual_multiplier * post_norm(o(softmax(scale * q(h) k^T where mask) v))."""
_ROUTED_ATTENTION = """\
k, v = key(h), value(h), appended to the cache for every token;
output = residual_multiplier * post_norm(o(softmax(scale * q(h) k^T where mask) v)) where execute, forecast elsewhere.
Only the executed tokens' rows of h enter q, the scores and o."""
_STRICT_ATTENTION = """\
k, v = key(h), value(h) where execute, zero elsewhere, appended to the cache;
output = residual_multiplier * post_norm(o(softmax(scale * q(h) k^T where mask and k is not zero) v)) where execute, forecast
elsewhere.
Only the executed tokens' rows of h enter q, k, v, the scores and o."""


def _inputs(
    names: tuple[str, ...], projections: tuple[str, ...], routed: bool, int4: Int4Attributes | None
) -> tuple[str, ...]:
    if int4 is not None:
        names += tuple(f"{name}_{part}" for part in ("scales", "zero_points") for name in projections)
    return names if routed else tuple(name for name in names if name not in ROUTING)


def _function(
    name: str,
    body: Body,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    optional: Collection[str],
    attributes: list[ir.Attr],
    doc: str,
    dtype: ir.DataType,
    int4: Int4Attributes | None,
    features: Features,
) -> ir.Function:
    values = {name: ir.Value(name=name, type=ir.TensorType(TYPES.get(name, dtype))) for name in inputs}
    for projection in int4 or ():
        values[f"{projection}_weight"].type = ir.TensorType(ir.DataType.UINT8)
    needed = {name for name in inputs if not name.endswith(OPTIONAL) or name == NEEDED}
    present = {name: value for name, value in values.items() if name in needed.union(optional)}
    function = build_function(
        lambda op, *_: body(op, Inputs(present, int4 or {}, features)),
        list(values.values()),
        domain=DOMAIN if int4 is None else INT4_DOMAIN,
        name=name,
        attributes=attributes,
        opset_imports=OPSETS,
    )
    tidy(function)
    for value, output in zip(function.outputs, outputs, strict=True):
        value.name = output
    function.doc_string = doc
    return function

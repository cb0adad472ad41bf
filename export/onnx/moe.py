"""The bodies of the functions of an MLP that is a mixture of experts. It is routed whole: a token executes all of its experts."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import MICROSOFT, Inputs, any_of, contribution, count, either, executed, largest, reference

# Swiglu with these constants is silu(gate) * up.
SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": float("inf"),
}


def dense(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> gate -> MoE, in int4 QMoE: each token's best experts, weighted -> (post_norm) -> (* residual_multiplier)"""
    return [_mixed(op, x["h"], x)]


def routed(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> NonZero -> rows;  h -> GatherND(rows) -> as ``dense`` -> ScatterND(forecast, rows), if there are any rows

    CUDA's kernels of both operators refuse to run for none.
    """
    rows = executed(op, x["execute"])

    def some(op: OpBuilder) -> ir.Value:
        return op.ScatterND(x["forecast"], rows, _mixed(op, op.GatherND(x["h"], rows), x))

    def none(op: OpBuilder) -> ir.Value:
        return op.CastLike(x["forecast"], x["h"])  # an identity; but the checker does not know an int4 forecast's type

    return [either(op, any_of(op, rows), ("executed", some), ("approximated", none))]


def _mixed(op: OpBuilder, h: ir.Value, x: Inputs) -> ir.Value:
    """``[..., d]`` -> ``[..., d]``; both operators take the softmax of the scores themselves."""
    scores = op.MatMul(h, x["gate_weight"])  # [..., experts]
    rows = op.Flatten(scores, axis=-1)  # [tokens, experts]
    chosen = {"k": reference("k", "experts_per_token", ir.AttributeType.INT), "_domain": MICROSOFT, **SWIGLU}
    if x.int4:
        y = _in_int4(op, h, rows, x, chosen)
        y = y if x.features.normalised else op.Mul(y, _share(op, scores))
    else:
        normalize = reference("normalize_routing_weights", "normalize", ir.AttributeType.INT)
        y = op.MoE(h, rows, x["gate_up_weight"], None, x["down_weight"], normalize_routing_weights=normalize, **chosen)
        y.type = h.type  # the operator is not ONNX's own, so the checker cannot infer it
    return contribution(op, y, x)


def _share(op: OpBuilder, scores: ir.Value) -> ir.Value:
    """``[..., experts]`` -> the best experts' share of the softmax ``[..., 1]``. (Softmax needs cuDNN on a GPU, this does not.)"""
    powers = op.Exp(op.Sub(scores, largest(op, scores, -1)))
    best, _ = op.TopK(powers, count(op, "experts_per_token"), axis=-1, sorted=0, _outputs=2)
    return op.Div(op.ReduceSum(best, [-1], keepdims=1), op.ReduceSum(powers, [-1], keepdims=1))


def _in_int4(op: OpBuilder, h: ir.Value, rows: ir.Value, x: Inputs, chosen: dict[str, Any]) -> ir.Value:
    """The experts' sum with weights that add up to 1: the CPU provider's kernel gives no other, whatever it is told."""
    bias, third = None, (None, None, None)
    weights = [x["gate_up_weight"], x["gate_up_scales"], bias, x["down_weight"], x["down_scales"], bias, *third]
    zero_points = [x.get("gate_up_zero_points"), x.get("down_zero_points")]
    y = op.QMoE(h, rows, *weights, *zero_points, normalize_routing_weights=1, **x.int4["down"], **chosen)
    y.type = h.type
    return y

"""The bodies of the functions of an MLP that is a mixture of experts. It is routed whole: a token executes all of its experts."""

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import MICROSOFT, Inputs, contribution, executed, reference


def dense(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> gate -> MoE: each token's best experts, weighted -> (post_norm) -> (* residual_multiplier)"""
    return [_mixed(op, x["h"], x)]


def routed(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> NonZero -> rows;  h -> GatherND(rows) -> as ``dense`` -> ScatterND(forecast, rows)"""
    rows = executed(op, x["execute"])
    return [op.ScatterND(x["forecast"], rows, _mixed(op, op.GatherND(x["h"], rows), x))]


def _mixed(op: OpBuilder, h: ir.Value, x: Inputs) -> ir.Value:
    """``[..., d]`` -> ``[..., d]``

    Swiglu with these constants is silu(gate) * up; MoE takes the softmax of the scores itself.
    """
    scores = op.Flatten(op.MatMul(h, x["gate_weight"]), axis=-1)  # [tokens, experts]
    y = op.MoE(
        h,
        scores,
        x["gate_up_weight"],
        None,
        x["down_weight"],
        k=reference("k", "experts_per_token", ir.AttributeType.INT),
        normalize_routing_weights=reference("normalize_routing_weights", "normalize", ir.AttributeType.INT),
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_limit=float("inf"),
        _domain=MICROSOFT,
    )
    y.type = h.type  # the operator is not ONNX's own, so the checker cannot infer it
    return contribution(op, y, x)

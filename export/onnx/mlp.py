"""The bodies of the MLP's functions."""

import onnx_ir as ir
from onnxscript import OpBuilder

from .body import Inputs, contribution, executed, linear


def dense(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> gate, up -> silu * -> down -> (post_norm) -> (* residual_multiplier)"""
    return [_gated(op, x["h"], x)]


def routed(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """execute -> NonZero -> rows;  h -> GatherND(rows) -> as ``dense`` -> ScatterND(forecast, rows)"""
    rows = executed(op, x["execute"])
    return [op.ScatterND(x["forecast"], rows, _gated(op, op.GatherND(x["h"], rows), x))]


def _gated(op: OpBuilder, h: ir.Value, x: Inputs) -> ir.Value:
    """``[..., d]`` -> ``[..., d]``"""
    gate, up = linear(op, h, x, "gate"), linear(op, h, x, "up")  # [..., f]
    return contribution(op, linear(op, op.Mul(_activated(op, gate, x), up), x, "down"), x)


def _activated(op: OpBuilder, gate: ir.Value, x: Inputs) -> ir.Value:
    if x.features.activation == "silu":
        return op.Mul(gate, op.Sigmoid(gate))
    return op.Gelu(gate, approximate="tanh")

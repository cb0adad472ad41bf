"""The body of a routed unit's decision, and the call of it."""

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from torch import Tensor
from torch.nn import functional as F

from ir_convert.units import RoutedUnit

from .body import Inputs
from .stored import Stored

ONE = 1.2784645427610738  # silu(ONE) = 1


def ranked(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> down -> silu -> up -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute"""
    if x["h"].dtype == ir.DataType.FLOAT:
        return _together(op, x)
    code = _silu(op, op.Add(op.MatMul(x["h"], x["down_weight"]), x["down_bias"]))
    forecast = op.Add(op.MatMul(code, x["up_weight"]), x["up_bias"])
    return [forecast, *_decision(op, x, _hidden(op, x))]


def constant(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """up_bias -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute"""
    return [op.Expand(x["up_bias"], op.Shape(x["h"])), *_decision(op, x, _hidden(op, x))]


def _together(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> both first layers and a constant 1, in one product -> silu ``[B, S, r + w + 1]`` -> forecast;  -> score -> execute

    At one token a step, nodes are what costs: so neither is the code split, nor are the last biases added: they are the 1's
    weights. ONNX Runtime joins the weights once, when it loads a model.
    """
    zero = op.Constant(value_float=0.0)

    def zeros(*sizes: ir.Value | list[int]) -> ir.Value:
        return op.Expand(zero, op.Concat(*sizes, axis=0))

    d, r, w = (op.Shape(x[name]) for name in ("up_bias", "down_bias", "hidden_bias"))
    first = op.Concat(x["down_weight"], x["hidden_weight"], zeros(d, [1]), axis=1)
    bias = op.Concat(x["down_bias"], x["hidden_bias"], [ONE], axis=0)
    up = op.Concat(x["up_weight"], zeros(w, d), op.Unsqueeze(x["up_bias"], [0]), axis=0)
    out = op.Concat(zeros(r), x["out_weight"], x["out_bias"], axis=0)
    code = _silu(op, op.Add(op.MatMul(x["h"], first), bias))
    score = op.MatMul(code, out)
    return [op.MatMul(code, up), op.Greater(score, x["threshold"]), score]


def _hidden(op: OpBuilder, x: Inputs) -> ir.Value:
    h = x["h"] if x["h"].dtype == ir.DataType.FLOAT else op.Cast(x["h"], to=ir.DataType.FLOAT)
    return _silu(op, op.Add(op.MatMul(h, x["hidden_weight"]), x["hidden_bias"]))


def _decision(op: OpBuilder, x: Inputs, hidden: ir.Value) -> list[ir.Value]:
    """``[B, S, w]`` -> execute, score"""
    score = op.Add(op.MatMul(hidden, x["out_weight"]), x["out_bias"])
    return [op.Greater(score, x["threshold"]), score]


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def decision_weights(stored: Stored, routed: RoutedUnit, prefix: str, forecasts: bool) -> dict[str, ir.Value]:
    """Adds the weights of a unit's forecaster and router, which lie in memory; returns them by their names in ``Decide``.

    Args:
        stored: where to add them.
        routed: the unit.
        prefix: of the tensors' names.
        forecasts: whether ``Decide`` has a forecaster. One of rank 0 then forecasts through a rank of zeros.
    """
    forecaster, router = routed.forecaster, routed.router

    def weight(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> ir.Value:
        shape = tuple(tensor.shape)
        return stored.initializer(f"{prefix}.{name}", shape, lambda: tensor, dtype, transpose=tensor.ndim == 2)

    weights = {
        "up_bias": weight("forecaster.bias", forecaster.bias, stored.dtype),
        "hidden_weight": weight("router.hidden", router.hidden),
        "hidden_bias": weight("router.hidden_bias", router.hidden_bias),
        "out_weight": weight("router.out", router.out[0]),
        "out_bias": weight("router.out_bias", router.out_bias),
    }
    if forecasts:
        down, down_bias, up = forecaster.down, forecaster.down_bias, forecaster.up
        if not forecaster.rank:
            down, down_bias, up = F.pad(down, (0, 0, 0, 1)), F.pad(down_bias, (0, 1)), F.pad(up, (0, 1))
        weights["down_weight"] = weight("forecaster.down", down, stored.dtype)
        weights["down_bias"] = weight("forecaster.down_bias", down_bias, stored.dtype)
        weights["up_weight"] = weight("forecaster.up", up, stored.dtype)
    return weights

"""The body of a routed unit's decision, and the call of it."""

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from torch import Tensor
from torch.nn import functional as F

from ir_convert.units import RoutedUnit

from .body import MICROSOFT, Inputs, reference
from .int4 import Int4
from .stored import Stored

ONE = 1.2784645427610738  # silu(ONE) = 1


def ranked(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """h -> down -> silu -> up -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute"""
    if x["h"].dtype == ir.DataType.FLOAT:
        return _together(op, x)
    code = _silu(op, op.Add(op.MatMul(x["h"], x["down_weight"]), x["down_bias"]))
    forecast = op.Add(op.MatMul(code, x["up_weight"]), x["up_bias"])
    return [forecast, *_decision(op, x, _score(op, x))]


def constant(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """up_bias -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute"""
    return [op.Expand(x["up_bias"], op.Shape(x["h"])), *_decision(op, x, _score(op, x))]


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
    return [op.MatMul(code, up), *_decision(op, x, _product(op, code, out))]


def quantised(op: OpBuilder, x: Inputs) -> list[ir.Value]:
    """As ``_together``, by weights in int4 ``[out, blocks, 16]``, biases added by the products; the code is split after silu.

    The constant 1 has a row of its own, whose scales are 0.
    """

    def product(h: ir.Value, weight: ir.Value, scales: ir.Value, bias: ir.Value, outputs: str, inputs: str) -> ir.Value:
        sizes = {name: reference(name, size, ir.AttributeType.INT) for name, size in (("N", outputs), ("K", inputs))}
        y = op.MatMulNBits(h, weight, scales, None, None, bias, **sizes, **x.int4["down"], _domain=MICROSOFT)
        y.type = h.type  # the operator is not ONNX's own, so the checker cannot infer it
        return y

    def under(name: str, part: str, filler: ir.TensorProtocol) -> ir.Value:
        """The rows of both first layers, and one of zeros."""
        down, hidden = x[f"down_{part}"], x[f"hidden_{part}"]
        row = op.Expand(op.Constant(value=filler), op.Concat([1], op.Shape(down, start=1), axis=0))
        return op.Concat(down, hidden, row, axis=0, _outputs=[name])

    weight = under("first_weight", "weight", ir.tensor([0], dtype=ir.DataType.UINT8))
    scales = under("first_scales", "scales", ir.tensor([0.0], dtype=ir.DataType.FLOAT))
    bias = op.Concat(x["down_bias"], x["hidden_bias"], [ONE], axis=0)
    code = _silu(op, product(x["h"], weight, scales, bias, "codes", "hidden_size"))
    rank = op.Shape(x["down_bias"])
    parts = op.Concat(rank, op.Sub(op.Shape(bias), rank), axis=0)
    forecaster, router = op.Split(code, parts, axis=-1, _outputs=["forecaster", "router"])
    forecast = product(forecaster, x["up_weight"], x["up_scales"], x["up_bias"], "hidden_size", "rank")
    score = _product(op, router, op.Concat(x["out_weight"], x["out_bias"], axis=0))
    return [forecast, *_decision(op, x, score)]


def _score(op: OpBuilder, x: Inputs) -> ir.Value:
    """h -> hidden -> silu -> out -> score, in float32"""
    h = x["h"] if x["h"].dtype == ir.DataType.FLOAT else op.Cast(x["h"], to=ir.DataType.FLOAT)
    hidden = _silu(op, op.Add(op.MatMul(h, x["hidden_weight"]), x["hidden_bias"]))
    return op.Add(_product(op, hidden, x["out_weight"]), x["out_bias"])


def _product(op: OpBuilder, code: ir.Value, weight: ir.Value) -> ir.Value:
    """``[B, S, w]`` * ``[w]`` -> ``[B, S]``, by a column: a vector would make one product for each token of it."""
    return op.Squeeze(op.MatMul(code, op.Unsqueeze(weight, [1])), [-1])


def _decision(op: OpBuilder, x: Inputs, score: ir.Value) -> list[ir.Value]:
    """score ``[B, S]`` -> execute, score"""
    return [op.Greater(score, x["threshold"]), score]


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def decision_weights(
    stored: Stored, routed: RoutedUnit, prefix: str, forecasts: bool, int4: Int4 | None = None
) -> tuple[dict[str, ir.Value], dict[str, int]]:
    """Adds the weights of a unit's forecaster and router, which lie in memory.

    Args:
        stored: where to add them.
        routed: the unit.
        prefix: of the tensors' names.
        forecasts: whether ``Decide`` has a forecaster. One of rank 0 then forecasts through a rank of zeros.
        int4: how to quantise them; None for not at all.

    Returns:
        The weights by their names in ``Decide``, and the call's attributes.
    """
    forecaster, router = routed.forecaster, routed.router

    def vector(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> ir.Value:
        return stored.initializer(f"{prefix}.{name}", tuple(tensor.shape), lambda: tensor, dtype)

    def matrix(short: str, name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, ir.Value]:
        outputs, inputs = tensor.shape
        return stored.matrix(short, f"{prefix}.{name}", (outputs, inputs), lambda: tensor, dtype, int4)

    weights = matrix("hidden", "router.hidden", router.hidden) | {
        "up_bias": vector("forecaster.bias", forecaster.bias, stored.dtype),
        "hidden_bias": vector("router.hidden_bias", router.hidden_bias),
        "out_weight": vector("router.out", router.out[0]),
        "out_bias": vector("router.out_bias", router.out_bias),
    }
    if not forecasts:
        return weights, {}
    down, down_bias, up = forecaster.down, forecaster.down_bias, forecaster.up
    if not forecaster.rank:
        down, down_bias, up = F.pad(down, (0, 0, 0, 1)), F.pad(down_bias, (0, 1)), F.pad(up, (0, 1))
    weights["down_bias"] = vector("forecaster.down_bias", down_bias, stored.dtype)
    weights |= matrix("down", "forecaster.down", down, stored.dtype) | matrix("up", "forecaster.up", up, stored.dtype)
    if int4 is None:
        return weights, {}
    rank, hidden_size = down.shape
    return weights, {"hidden_size": hidden_size, "rank": rank, "codes": rank + router.width + 1}

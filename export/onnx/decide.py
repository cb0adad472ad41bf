"""Forecast and decision of a routed unit, as graph nodes."""

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from torch import Tensor

from ir_convert.units import RoutedUnit

from .stored import Stored


def decide(
    op: OpBuilder, stored: Stored, h: ir.Value, routed: RoutedUnit, threshold: ir.Value, prefix: str
) -> dict[str, ir.Value]:
    """h -> down -> silu -> up -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute

    The router is fp32 at every precision: its scores are compared with a threshold that was measured in fp32.

    Args:
        h: ``[B, S, hidden]``.
        threshold: of every token ``[B, S]``.
        prefix: of the tensors' names.

    Returns:
        forecast ``[B, S, hidden]`` and execute bool ``[B, S]``.
    """

    def weight(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> ir.Value:
        shape = tuple(tensor.shape)
        return stored.initializer(f"{prefix}.{name}", shape, lambda: tensor, dtype, transpose=tensor.ndim == 2)

    forecaster, router, dtype = routed.forecaster, routed.router, stored.dtype
    if forecaster.rank and dtype == torch.float32:
        # Both first layers in one product: at one token a step, nodes are what costs.
        first = weight("first", torch.cat([forecaster.down, router.hidden]))
        bias = weight("first_bias", torch.cat([forecaster.down_bias, router.hidden_bias]))
        code = _silu(op, op.Add(op.MatMul(h, first), bias))
        down, hidden = op.Split(code, [forecaster.rank, router.width], axis=-1, _outputs=["code", "hidden"])
    else:
        tall = h if dtype == torch.float32 else op.Cast(h, to=ir.DataType.FLOAT)
        hidden = op.MatMul(tall, weight("router.hidden", router.hidden))
        hidden = _silu(op, op.Add(hidden, weight("router.hidden_bias", router.hidden_bias)))
        if forecaster.rank:
            down = op.MatMul(h, weight("forecaster.down", forecaster.down, dtype))
            down = _silu(op, op.Add(down, weight("forecaster.down_bias", forecaster.down_bias, dtype)))

    bias = weight("forecaster.bias", forecaster.bias, dtype)
    if forecaster.rank:
        up = weight("forecaster.up", forecaster.up, dtype)
        forecast = op.Add(op.MatMul(down, up), bias, _outputs=["forecast"])
    else:
        forecast = op.Expand(bias, op.Shape(h), _outputs=["forecast"])
    score = op.MatMul(hidden, weight("router.out", router.out[0]))  # [B, S]
    score = op.Add(score, weight("router.out_bias", router.out_bias), _outputs=["score"])
    return {"forecast": forecast, "execute": op.Greater(score, threshold, _outputs=["execute"])}


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))

"""Forecast and decision of a routed unit, as graph nodes."""

from functools import partial

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from ir_convert.units import RoutedUnit

from .stored import Stored

# What the forecaster's and the router's first layers are stored as where one product computes both.
FIRST = {
    "first": ("forecaster.down", "router.hidden"),
    "first_bias": ("forecaster.down_bias", "router.hidden_bias"),
}


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
    tensors = routed.tensors()

    def weight(name: str, dtype: torch.dtype) -> ir.Value:
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        return stored.initializer(f"{prefix}.{name}", shape, lambda: tensor, dtype, transpose=tensor.ndim == 2)

    rank, bias = routed.forecaster.rank, weight("forecaster.bias", stored.dtype)
    if stored.dtype == torch.float32 and rank:
        # Both first layers in one product: at one token a step, nodes are what costs.
        both = {part: torch.cat([tensors[name] for name in pair]) for part, pair in FIRST.items()}
        first = [
            stored.initializer(f"{prefix}.{part}", tuple(t.shape), partial(_itself, t), torch.float32, t.ndim == 2)
            for part, t in both.items()
        ]
        code = _silu(op, op.Add(op.MatMul(h, first[0]), first[1]))
        down, hidden = op.Split(code, [rank, routed.router.width], axis=-1, _outputs=["code", "hidden"])
    else:
        tall = h if stored.dtype == torch.float32 else op.Cast(h, to=ir.DataType.FLOAT)
        hidden = op.MatMul(tall, weight("router.hidden", torch.float32))
        hidden = _silu(op, op.Add(hidden, weight("router.hidden_bias", torch.float32)))
        if rank:
            down = op.MatMul(h, weight("forecaster.down", stored.dtype))
            down = _silu(op, op.Add(down, weight("forecaster.down_bias", stored.dtype)))

    if rank:
        forecast = op.Add(op.MatMul(down, weight("forecaster.up", stored.dtype)), bias, _outputs=["forecast"])
    else:
        forecast = op.Expand(bias, op.Shape(h), _outputs=["forecast"])
    score = op.MatMul(hidden, weight("router.out", torch.float32))
    score = op.Squeeze(op.Add(score, weight("router.out_bias", torch.float32)), [-1], _outputs=["score"])
    return {"forecast": forecast, "execute": op.Greater(score, threshold, _outputs=["execute"])}


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

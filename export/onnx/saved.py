"""What a call did, as the graph itself reports it: a runtime can hold the sparsity where it was asked for, or watch it."""

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from ir_convert.families import UNITS
from ir_convert.flops import Budget


def flops_saved(op: OpBuilder, budget: Budget, executed: dict[tuple[int, str], ir.Value], new: ir.Value) -> ir.Value:
    """Concat(execute of U units) -> tokens executed ``[U]`` -> share approximated -> . unit's share - overhead ``[1]``

    Padding counts nowhere. A handful of nodes for the whole model: at one token a step, nodes are what costs.

    Args:
        budget: what each unit saves, and what routing costs.
        executed: ``bool[B, S]`` by routed unit.
        new: ``bool[B, S]``: which tokens are real.
    """
    if not executed:
        return op.Identity(op.initializer(ir.tensor(np.zeros(1, np.float32)), "saved.none"))
    flags = op.Reshape(op.Concat(*executed.values(), axis=0), [len(executed), -1])  # [U, B S]
    counts = op.ReduceSum(op.Cast(flags, to=ir.DataType.FLOAT), [1], keepdims=0)  # [U]
    tokens = op.ReduceSum(op.Cast(new, to=ir.DataType.FLOAT), keepdims=0)
    rates = op.Sub(1.0, op.Div(counts, op.Max(tokens, 1.0)))
    shares = np.array([[budget.share(unit)] for _, unit in executed], np.float32)
    saved = op.MatMul(rates, op.initializer(ir.tensor(shares), "saved.shares"))  # [1]
    return op.Sub(saved, budget.overhead_share)


def trace(op: OpBuilder, executed: dict[tuple[int, str], ir.Value], new: ir.Value, layers: int) -> ir.Value:
    """Returns which tokens each unit executed, ``bool[layers, 2, B, S]``: attention, then MLP.

    Args:
        executed: ``bool[B, S]`` by routed unit; the others execute every real token.
        new: ``bool[B, S]``: which tokens are real.
    """
    flags = [executed.get((layer, unit), new) for layer in range(layers) for unit in UNITS]
    stacked = op.Concat(*(op.Unsqueeze(flag, [0]) for flag in flags), axis=0)  # [layers * 2, B, S]
    return op.Reshape(stacked, op.Concat([layers, len(UNITS)], op.Shape(new), axis=0))

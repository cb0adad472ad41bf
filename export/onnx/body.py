"""What the bodies of the units' functions are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnxscript import OpBuilder

MICROSOFT = "com.microsoft"

Trace = Callable[[OpBuilder], ir.Value]
Traces = Callable[[OpBuilder], Sequence[ir.Value]]


@dataclass(frozen=True)
class Features:
    """What a family's units do that no input tells: each decides which nodes a body has.

    Attributes:
        activation: of an MLP's gate: ``silu`` or ``gelu_pytorch_tanh``.
        whole_norms: q_norm and k_norm are of all heads together, not of each.
        scaled: the unit's output is multiplied by the attribute residual_multiplier.
        normalised: the weights of a token's experts add up to 1.
    """

    activation: str = "silu"
    whole_norms: bool = False
    scaled: bool = False
    normalised: bool = True


PLAIN = Features()


@dataclass(frozen=True)
class Inputs:
    """A function's inputs while its body is traced.

    Attributes:
        values: by name; None where an optional input is absent.
        int4: the attributes of MatMulNBits or QMoE, by projection; none where weights are not quantised.
        features: what else decides the body.
    """

    values: Mapping[str, ir.Value | None]
    int4: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    features: Features = PLAIN

    def __getitem__(self, name: str) -> ir.Value:
        """Returns an input that is there."""
        value = self.values[name]
        assert value is not None, name
        return value

    def get(self, name: str) -> ir.Value | None:
        """Returns an input, or None."""
        return self.values.get(name)


def executed(op: OpBuilder, flags: ir.Value) -> ir.Value:
    """bool ``[B, S]`` -> the (sequence, place) of every True, in order ``[n, 2]``."""
    return op.Transpose(op.NonZero(flags), perm=[1, 0])


def any_of(op: OpBuilder, rows: ir.Value) -> ir.Value:
    """Whether there are any rows. Counted in each branch that asks: of a value from outside, CUDA's provider does not know that it
    lies with the host.
    """
    return op.Greater(op.Size(rows), 0)


def linear(op: OpBuilder, h: ir.Value, x: Inputs, name: str) -> ir.Value:
    """``[..., in]`` -> * weight (+ bias) -> ``[..., out]``"""
    weight, bias = x[f"{name}_weight"], x.get(f"{name}_bias")
    if (attributes := x.int4.get(name)) is not None:
        parts = x[f"{name}_scales"], x.get(f"{name}_zero_points")
        y = op.MatMulNBits(h, weight, *parts, **attributes, _domain=MICROSOFT)
        y.type = h.type  # the operator is not ONNX's own, so the checker cannot infer it
    else:
        y = op.MatMul(h, weight)
    return y if bias is None else op.Add(y, bias)


def contribution(op: OpBuilder, y: ir.Value, x: Inputs) -> ir.Value:
    """``[..., d]`` -> (post_norm) -> (* residual_multiplier): what follows a unit, and is saved with it."""
    y = rms_norm(op, y, x.get("post_norm"))
    if not x.features.scaled:
        return y
    factor = op.Constant(value_float=reference("value_float", "residual_multiplier", ir.AttributeType.FLOAT))
    factor.type = ir.TensorType(ir.DataType.FLOAT)
    return op.Mul(y, op.CastLike(factor, y))


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value | None) -> ir.Value:
    """``[..., n]``, by a weight ``[n]``; x itself where there is none."""
    if weight is None:
        return x
    return op.RMSNormalization(x, weight, epsilon=reference("epsilon", "epsilon", ir.AttributeType.FLOAT))


def split_heads(op: OpBuilder, y: ir.Value, heads: str) -> ir.Value:
    """``[B, S, heads D]`` -> ``[B, S, heads, D]``; S may be 0, which leaves no size to be inferred."""
    return op.Reshape(y, op.Concat([0, 0], count(op, heads), count(op, "head_dim"), axis=0))


def by_head(op: OpBuilder, y: ir.Value, heads: str) -> ir.Value:
    """``[B, S, heads D]`` -> ``[B, heads, S, D]``"""
    return op.Transpose(split_heads(op, y, heads), perm=[0, 2, 1, 3])


def merge_heads(op: OpBuilder, y: ir.Value, heads: str) -> ir.Value:
    """``[B, S, heads, D]`` -> ``[B, S, heads D]``"""
    return op.Reshape(y, op.Concat([0, 0], op.Mul(count(op, heads), count(op, "head_dim")), axis=0))


def largest(op: OpBuilder, x: ir.Value, axis: int) -> ir.Value:
    """The largest number along an axis, which stays, of size 1. (ReduceMax needs cuDNN on a GPU, this does not.)"""
    values, _ = op.TopK(x, [1], axis=axis, sorted=0, _outputs=2)
    return values


def count(op: OpBuilder, attribute: str) -> ir.Value:
    """The value of one of the function's attributes, ``[1]``."""
    count = op.Constant(value_int=reference("value_int", attribute, ir.AttributeType.INT))
    count.type = ir.TensorType(ir.DataType.INT64)
    return op.Unsqueeze(count, [0])


def either(op: OpBuilder, condition: ir.Value, then: tuple[str, Trace], otherwise: tuple[str, Trace]) -> ir.Value:
    """An If with named branches of one output each."""

    def traced(name: str, trace: Trace) -> ir.Graph:
        return branch(op, name, lambda op: [trace(op)])

    return op.If(condition, then_branch=traced(*then), else_branch=traced(*otherwise))


def fork(
    op: OpBuilder,
    condition: ir.Value,
    then: tuple[str, Traces],
    otherwise: tuple[str, Traces],
    outputs: tuple[str, ...],
) -> Sequence[ir.Value]:
    """An If with named branches of several outputs each."""
    made = {"then_branch": then, "else_branch": otherwise}
    branches = {name: branch(op, *traced, len(outputs)) for name, traced in made.items()}
    return op.If(condition, **branches, _outputs=list(outputs))


def branch(op: OpBuilder, name: str, trace: Traces, outputs: int = 1) -> ir.Graph:
    """Traces one branch of an If; it sees the values around it."""

    def scoped(inner: OpBuilder) -> Sequence[ir.Value] | ir.Value:
        inner.builder.push_module(name)
        values = trace(inner)
        return values if outputs > 1 else values[0]

    return op.builder.subgraph(scoped, [], [ir.Value(name="") for _ in range(outputs)], name=name)


def repeated(op: OpBuilder, name: str, trips: ir.Value, y: ir.Value, trace: Callable[..., ir.Value]) -> ir.Value:
    """A Loop that carries one value; ``trace`` gives what becomes of it in a trip, from the trip's number ``[]`` and the value.

    Args:
        trips: how many ``[]``.
        y: the value before the first.
    """

    def scoped(inner: OpBuilder, trip: ir.Value, more: ir.Value, value: ir.Value) -> Sequence[ir.Value]:
        inner.builder.push_module(name)
        return [inner.Identity(more), trace(inner, trip, value)]

    kinds = {"trip": ir.DataType.INT64, "more": ir.DataType.BOOL}
    inputs = [ir.Value(name=part, type=ir.TensorType(kind), shape=ir.Shape([])) for part, kind in kinds.items()]
    inputs.append(ir.Value(name="before", type=y.type))
    body = op.builder.subgraph(scoped, inputs, [ir.Value(name="") for _ in range(2)], name=name)
    return op.Loop(trips, None, y, body=body)


def reference(name: str, attribute: str, kind: ir.AttributeType) -> ir.Attr:
    """A node attribute that takes the value of the function's attribute."""
    return ir.RefAttr(name, attribute, kind)

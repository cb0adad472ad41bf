"""A mixture's weights as com.microsoft's MoE takes them, and in int4 its QMoE: those of all experts in one tensor."""

from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from ir_convert.checkpoint import Checkpoint
from ir_convert.families import experts_of

from .int4 import Int4, lazy_parts, quantise
from .weights import require_shape

MOE_PROJECTIONS = ("gate_up", "down")  # as the functions call them; what scores the experts is not in int4


def expert_weights(
    checkpoint: Checkpoint, inside: str, packed: str, parts: tuple[str, ...], matrix: tuple[int, int]
) -> Iterator[Tensor]:
    """Yields, for each expert, the rows of some of its projections by turns ``[parts * rows, in]``.

    Args:
        inside: where the experts are, e.g. ``model.layers.0.mlp.experts``.
        packed: what a tensor there of all experts is called, a projection's rows being neighbours in it; it need not be there.
        parts: the projections.
        matrix: the shape that each has to come out in.

    Raises:
        UserError: a tensor has another shape.
    """
    experts = experts_of(checkpoint.config)
    assert experts is not None
    if (name := f"{inside}.{packed}") in checkpoint.shards:
        for rows in require_shape(name, checkpoint.read(name), (experts.count, *matrix)):
            yield rows.unflatten(0, (len(parts), -1)).transpose(0, 1).flatten(0, 1)
        return
    rows_of_each, inputs = matrix[0] // len(parts), matrix[1]
    for expert in range(experts.count):
        together = torch.empty(0)
        for turn, part in enumerate(parts):  # one of them in memory beside what they become
            name = f"{inside}.{expert}.{part}.weight"
            weight = require_shape(name, checkpoint.read(name), (rows_of_each, inputs))
            together = together if turn else weight.new_empty(rows_of_each, len(parts), inputs)
            together[:, turn] = weight
            del weight
        yield together.flatten(0, 1)


def stacked(shape: tuple[int, int, int], each: Callable[[], Iterator[Tensor]], dtype: torch.dtype) -> Tensor:
    """Returns all experts' weights ``[E, out, in]``, one at a time beside them in memory."""
    whole = torch.empty(shape, dtype=dtype)
    for rows, weight in zip(whole, each(), strict=True):
        rows.copy_(weight)
    return whole


def int4_expert_tensors(
    name: str, shape: tuple[int, int, int], each: Callable[[], Iterator[Tensor]], int4: Int4, dtype: torch.dtype
) -> dict[str, ir.LazyTensor]:
    """Returns the tensors of all experts' weights, quantised one by one when they are written; see ``int4_tensors``.

    ``weight`` is uint8 ``[E, out, in / 2]``; others have a first dimension of E. There have to be whole blocks of inputs.
    """
    count, *matrix = shape
    shapes = {part: (count, *sizes) for part, sizes in int4.shapes(*matrix).items()}
    shapes["weight"] = (count, matrix[0], matrix[1] // 2)

    def make() -> dict[str, Tensor]:
        packed = [quantise(weight, int4, name) for weight in each()]
        return {part: torch.stack([one.parts()[part] for one in packed]).view(shapes[part]) for part in shapes}

    return lazy_parts(name, shapes, make, int4, dtype)

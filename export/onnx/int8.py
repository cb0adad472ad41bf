"""int8 weights for the language-model head of an int4 model, as MatMulNBits takes them.

A head in int4 costs about as much perplexity as all units together, one in int8 none that shows; it is read whole for every
token, so left in fp32 it would dominate a small model's steps. Rounded to the nearest of 255 steps around 0, 32 inputs a scale.
"""

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ir_convert.errors import UserError

from ..finite import is_finite
from .weights import LazyWeight, by_parts, require_shape

BLOCK, ZERO, LARGEST = 32, 128, 127
CHUNK = 1 << 22  # weights that are quantised together
# Level 4 rounds activations to int8, block by block; without it the CPU kernel is a hundred times slower.
ATTRIBUTES = {"bits": 8, "block_size": BLOCK, "accuracy_level": 4}


def quantise(weight: Tensor, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """Quantises a Linear's weight ``[out, in]``.

    Returns:
        uint8 ``[out, ceil(in / 32), 32]``, inputs filled up to whole blocks, and scales, fp32 ``[out, ceil(in / 32)]``:
        weight = scale * (q - 128).

    Raises:
        UserError: a value is not finite.
    """
    if not is_finite(weight):
        raise UserError(f"tensor '{name}' holds values that are not finite: check the checkpoint")
    packed, scales = [], []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        blocks = F.pad(rows.float(), (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax(-1) / LARGEST
        q = (blocks / scale.clamp(min=1e-30).unsqueeze(-1)).round().clamp(-LARGEST, LARGEST) + ZERO
        packed.append(q.to(torch.uint8))
        scales.append(scale)
    return torch.cat(packed), torch.cat(scales)


def int8_tensors(
    name: str, shape: tuple[int, int], read: Callable[[], Tensor], dtype: torch.dtype
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """Returns ``{name}.int8`` and ``{name}.scales``, read and quantised when they are written.

    Args:
        shape: the shape ``(out, in)`` that ``read`` must return.
        dtype: of the scales: that of the activations.
    """
    outputs, blocks = shape[0], -(-shape[1] // BLOCK)

    def make() -> dict[str, Tensor]:
        return dict(zip(("int8", "scales"), quantise(require_shape(name, read(), shape), name), strict=True))

    take = by_parts(make)
    return (
        LazyWeight(f"{name}.int8", (outputs, blocks, BLOCK), lambda: take("int8"), torch.uint8),
        LazyWeight(f"{name}.scales", (outputs, blocks), lambda: take("scales"), dtype),
    )

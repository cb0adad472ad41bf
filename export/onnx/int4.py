"""int4 weights, as ONNX Runtime's MatMulNBits takes them, and what it computes with.

    weight[o, i] ~ scale[o, b] (q[o, i] - zero[o, b]),   q and zero in 0..15,  b = i // 32

Weights alone are quantised, a tensor at a time; activations stay what they are (but see ``Int4.accuracy_level``). The
rounding itself is onnxruntime's own, so a file from here equals one that its tools would have quantised, but for blocks that a
method spoils (``int4_methods.WORSE``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ir_convert.choices import INT4_METHODS
from ir_convert.errors import UserError

from ..finite import is_finite
from .int4_methods import METHODS, Packed
from .weights import LazyWeight, by_parts, require_shape

CHUNK = 1 << 20  # weights that are quantised together: what the methods put beside them stays small


@dataclass(frozen=True)
class Int4:
    """How weights are quantised.

    Attributes:
        method: ``rtn``: rounded to the nearest of 16 steps around 0. ``rtn_asym``: of 16 steps between each block's extremes.
            ``hqq``: the same, with fractional zero points fitted to the weights; ONNX Runtime's CPU kernel is slow with them (at
            2048 x 8192 and one token 68 ms, others 1 to 2). ``k_quant``: as ``rtn_asym``, steps fitted to the weights.
        accuracy_level: of MatMulNBits: 4 lets it round activations to int8, block by block; 1 keeps them fp32; 0 leaves it
            to the kernel, which then does as 1 does. Measured with onnxruntime 1.31, one core with AVX-512 VNNI, M tokens, in
            milliseconds at 768 x 768 | 2048 x 8192:

                          M = 1          M = 4          M = 512
            level 0, 1    0.06 | 2.1     0.18 | 5.3     5.8 | 230
            level 4       0.04 | 0.9     0.07 | 1.4     5.1 | 150
            fp32 MatMul   0.09 | 4.9     0.15 | 5.1     5.8 | 258

            Against products of the dequantised weights, level 4 is off by 0.5 % (rms), level 1 by rounding; int4 itself is
            off by 8 %. So 4, which is also what onnxruntime-genai asks for.
        block: weights that share a scale, along the inputs.
    """

    method: str = "rtn"
    accuracy_level: int = 4
    block: int = 32

    def __post_init__(self) -> None:
        if self.method not in INT4_METHODS:
            raise UserError(f"--int4-method '{self.method}' is not known: give {' or '.join(INT4_METHODS)}")

    @property
    def zero_points(self) -> bool:
        """Whether the method has any: a symmetric one's are all 8."""
        return self.method != "rtn"

    @property
    def whole_zero_points(self) -> bool:
        """Whether those that it has are integers too."""
        return self.method != "hqq"

    def facts(self) -> dict[str, Any]:
        """Returns what decides the weights, for metadata."""
        return {"bits": 4, "block": self.block, "method": self.method}

    @property
    def settings(self) -> dict[str, int]:
        """MatMulNBits' attributes but for a weight's sizes."""
        # The level is left out where unset: not every execution provider knows it.
        level = {"accuracy_level": self.accuracy_level} if self.accuracy_level else {}
        return {"bits": 4, "block_size": self.block} | level

    def attributes(self, outputs: int, inputs: int) -> dict[str, int]:
        """Returns MatMulNBits' attributes for a weight ``[outputs, inputs]``."""
        return {"K": inputs, "N": outputs} | self.settings

    @property
    def expert_attributes(self) -> dict[str, int]:
        """QMoE's attributes; as here, weights are laid out as MatMulNBits', for the kernels of every provider to repack."""
        return {
            "expert_weight_bits": 4,
            "block_size": self.block,
            "accuracy_level": self.accuracy_level,
            "weights_prepacked": 0,
        }

    def blocks(self, inputs: int) -> int:
        """Returns how many blocks a row of this width has."""
        return -(-inputs // self.block)

    def shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of ``Packed.parts`` for a weight ``[outputs, inputs]``."""
        blocks = self.blocks(inputs)
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (outputs, blocks, self.block // 2),
            "scales": (outputs, blocks),
        }
        if not self.whole_zero_points:
            shapes["zero_points"] = (outputs, blocks)
        elif self.zero_points:
            shapes["zero_points"] = (outputs, (blocks + 1) // 2)
        return shapes

    def size(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Returns the bytes that a weight takes where scales take ``itemsize`` bytes each."""
        sizes = {part: int(np.prod(shape)) for part, shape in self.shapes(outputs, inputs).items()}
        floats = {"scales"} if self.whole_zero_points else {"scales", "zero_points"}
        return sum(size * (itemsize if part in floats else 1) for part, size in sizes.items())


def quantise(weight: Tensor, int4: Int4, name: str = "a weight") -> Packed:
    """Quantises a Linear's weight ``[out, in]`` of any float type.

    Raises:
        UserError: a value is not finite.
    """
    if not is_finite(weight):
        raise UserError(f"tensor '{name}' holds values that are not finite: check the checkpoint")
    method = METHODS[int4.method]
    rows = max(1, CHUNK // weight.shape[1])
    chunks = [method(chunk.float(), int4.block) for chunk in weight.split(rows)]
    zeros = [chunk.zero_points for chunk in chunks if chunk.zero_points is not None]
    return Packed(
        torch.cat([chunk.weight for chunk in chunks]),
        torch.cat([chunk.scales for chunk in chunks]),
        torch.cat(zeros) if zeros else None,
        weight.shape[1],
    )


def dequantised(weight: Tensor, int4: Int4) -> Tensor:
    """Returns what MatMulNBits computes with in place of ``weight[out, in]``: fp32, the same shape."""
    return quantise(weight, int4).dequantised()


def int4_tensors(
    name: str, shape: tuple[int, int], read: Callable[[], Tensor], int4: Int4, dtype: torch.dtype
) -> dict[str, ir.LazyTensor]:
    """Returns the tensors of one quantised weight, read and quantised when they are written, by the names in ``Packed.parts``.

    Make them neighbours in the graph: see ``by_parts``.

    Args:
        name: the weight's name; parts are called ``{name}.int4``, ``{name}.scales``, ``{name}.zero_points``.
        shape: the shape ``(out, in)`` that ``read`` must return.
        read: returns the weight.
        int4: how to quantise it.
        dtype: of scales, and of fractional zero points: that of the activations.
    """
    return lazy_parts(
        name, int4.shapes(*shape), lambda: quantise(require_shape(name, read(), shape), int4, name).parts(), int4, dtype
    )


def lazy_parts(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[], Mapping[str, Tensor]],
    int4: Int4,
    dtype: torch.dtype,
) -> dict[str, ir.LazyTensor]:
    """Returns the tensors of a quantised weight that ``make`` reads and quantises; shapes and parts as in ``Packed.parts``."""
    take = by_parts(make)

    def lazy(part: str, part_shape: tuple[int, ...]) -> ir.LazyTensor:
        is_bytes = part == "weight" or (part == "zero_points" and int4.whole_zero_points)
        written = f"{name}.{'int4' if part == 'weight' else part}"
        return LazyWeight(written, part_shape, lambda: take(part), torch.uint8 if is_bytes else dtype)

    return {part: lazy(part, part_shape) for part, part_shape in shapes.items()}

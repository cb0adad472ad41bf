"""int4 weights, as ONNX Runtime's MatMulNBits takes them, and what it computes with.

    weight[o, i] ~ scale[o, b] (q[o, i] - zero[o, b]),   q and zero in 0..15,  b = i // 32

Weights alone are quantised, a tensor at a time; activations stay what they are (but see ``Int4.accuracy_level``). The
rounding itself is onnxruntime's own, so a file from here equals one that its tools would have quantised, but for blocks that a
method spoils (``WORSE``).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from torch import Tensor

from ir_convert.choices import INT4_METHODS
from ir_convert.errors import UserError

from ..finite import is_finite
from .weights import LazyWeight, by_parts

CHUNK = 1 << 20  # weights that are quantised together: what the methods put beside them stays small
SYMMETRIC_ZERO = 8
# A block that a method leaves this much further off than plain rounding is rounded plainly: k_quant loses blocks whose
# weights all have one sign, HQQ those that are much smaller than 1e-3.
WORSE = 2.0


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
        if self.method == "hqq":
            shapes["zero_points"] = (outputs, blocks)
        elif self.zero_points:
            shapes["zero_points"] = (outputs, (blocks + 1) // 2)
        return shapes

    def size(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Returns the bytes that a weight takes where scales take ``itemsize`` bytes each."""
        sizes = {part: int(np.prod(shape)) for part, shape in self.shapes(outputs, inputs).items()}
        floats = {"scales", "zero_points"} if self.method == "hqq" else {"scales"}
        return sum(size * (itemsize if part in floats else 1) for part, size in sizes.items())


@dataclass(frozen=True)
class Packed:
    """One quantised weight ``[out, in]``, its inputs filled up with zeros to whole blocks.

    Attributes:
        weight: uint8 ``[out, blocks, 16]``: two weights a byte, the earlier in the low half.
        scales: fp32 ``[out, blocks]``.
        zero_points: None for 8 everywhere; uint8 ``[out, ceil(blocks / 2)]``, two a byte; or fp32 ``[out, blocks]``.
        inputs: the width before it was filled up.
    """

    weight: Tensor
    scales: Tensor
    zero_points: Tensor | None
    inputs: int

    def parts(self) -> dict[str, Tensor]:
        """Returns MatMulNBits' inputs after the first, by name and in its order."""
        parts = {"weight": self.weight, "scales": self.scales}
        return parts if self.zero_points is None else parts | {"zero_points": self.zero_points}

    def dequantised(self) -> Tensor:
        """Returns the weight that the kernel computes with, fp32 ``[out, in]``."""
        q = _halves(self.weight).float()  # [out, blocks, 32]
        zeros: Tensor | int = SYMMETRIC_ZERO
        if self.zero_points is not None:
            packed = self.zero_points.dtype == torch.uint8
            zeros = _halves(self.zero_points)[:, : self.scales.shape[1]] if packed else self.zero_points
            zeros = zeros.float().unsqueeze(-1)
        return q.sub_(zeros).mul_(self.scales.unsqueeze(-1)).flatten(1)[:, : self.inputs].contiguous()


def quantise(weight: Tensor, int4: Int4, name: str = "a weight") -> Packed:
    """Quantises a Linear's weight ``[out, in]`` of any float type.

    Raises:
        UserError: a value is not finite.
    """
    if not is_finite(weight):
        raise UserError(f"tensor '{name}' holds values that are not finite: check the checkpoint")
    method = {"rtn": _rtn, "rtn_asym": _rtn_asymmetric, "hqq": _hqq, "k_quant": _k_quant}[int4.method]
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
    take = by_parts(name, shape, read, lambda weight: quantise(weight, int4, name).parts())

    def lazy(part: str, part_shape: tuple[int, ...]) -> ir.LazyTensor:
        is_bytes = part == "weight" or (part == "zero_points" and int4.method != "hqq")
        written = f"{name}.{'int4' if part == 'weight' else part}"
        return LazyWeight(written, part_shape, lambda: take(part), torch.uint8 if is_bytes else dtype)

    return {part: lazy(part, part_shape) for part, part_shape in int4.shapes(*shape).items()}


def _rtn(weight: Tensor, block: int, symmetric: bool = True) -> Packed:
    """By onnxruntime's C++, which wants ``[in, out]``."""
    (outputs, inputs), blocks = weight.shape, -(-weight.shape[1] // block)
    source = torch.empty(blocks * block, outputs)
    source[:inputs], source[inputs:] = weight.T, 0
    packed = np.zeros((outputs, blocks, block // 2), np.uint8)
    scales = np.zeros((outputs, blocks), np.float32)
    zeros = np.zeros((outputs, (blocks + 1) // 2), np.uint8)
    quantize_matmul_4bits(packed, source.numpy(), scales, zeros, block, outputs, inputs, symmetric)
    return Packed(
        torch.from_numpy(packed), torch.from_numpy(scales), None if symmetric else torch.from_numpy(zeros), inputs
    )


def _rtn_asymmetric(weight: Tensor, block: int) -> Packed:
    return _rtn(weight, block, symmetric=False)


def _hqq(weight: Tensor, block: int) -> Packed:
    q, scales, zeros = _onnxruntime().hqq(weight, bits=4, group_size=block)
    return _sane(weight, block, q.view(*scales.shape, block).to(torch.uint8), scales, zeros)


def _k_quant(weight: Tensor, block: int) -> Packed:
    blocks = -(-weight.shape[1] // block)
    filled = torch.nn.functional.pad(weight, (0, blocks * block - weight.shape[1]))
    with np.errstate(all="ignore"):  # it divides 0 by 0 where a block is constant
        parts = _onnxruntime().k_quant(filled.numpy(), 4, block)
    q, scales, zeros = (torch.from_numpy(np.nan_to_num(part)).view(-1, blocks, part.shape[1]) for part in parts)
    return _sane(weight, block, q.to(torch.uint8), scales[..., 0].float(), zeros[..., 0])


def _sane(weight: Tensor, block: int, q: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
    """Packs what a method found, plain rounding in its place where it failed: see ``WORSE``.

    Args:
        q: uint8 ``[out, blocks, block]``. scales: fp32 ``[out, blocks]``. zeros: uint8 or fp32 ``[out, blocks]``.
    """

    def furthest(packed: Packed) -> Tensor:
        errors = (packed.dequantised() - weight).abs()
        return torch.nn.functional.pad(errors, (0, -errors.shape[1] % block)).unflatten(1, (-1, block)).amax(-1)

    def pack(q: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
        return Packed(_pack(q), scales, _pack(zeros) if zeros.dtype == torch.uint8 else zeros, weight.shape[1])

    found, plain = pack(q, scales, zeros), _rtn_asymmetric(weight, block)
    keep = furthest(found) <= WORSE * furthest(plain)  # False where it is NaN
    if keep.all():
        return found
    assert plain.zero_points is not None
    plain_zeros = _halves(plain.zero_points)[:, : scales.shape[1]].to(zeros.dtype)
    return pack(
        torch.where(keep.unsqueeze(-1), q, _halves(plain.weight)),
        torch.where(keep, scales, plain.scales),
        torch.where(keep, zeros, plain_zeros),
    )


def _pack(values: Tensor) -> Tensor:
    """uint8 ``[..., n]``, each below 16 -> ``[..., ceil(n / 2)]``."""
    values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return values[..., ::2] | (values[..., 1::2] << 4)


def _halves(packed: Tensor) -> Tensor:
    """The inverse of ``_pack``: uint8 ``[..., n]`` -> ``[..., 2 n]``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


@dataclass(frozen=True)
class _Methods:
    hqq: Callable[..., tuple[Tensor, Tensor, Tensor]]
    k_quant: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


@cache
def _onnxruntime() -> _Methods:
    with _own_logging():
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
        from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
    hqq = quantizer.HQQWeightOnlyQuantizer(quantizer.HQQWeightOnlyQuantConfig())
    return _Methods(hqq.quantize_internal, quant_tensor_k_quant_cpu)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Undoes what onnxruntime's quantiser does to the whole process when it is imported: it logs everything from INFO on."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

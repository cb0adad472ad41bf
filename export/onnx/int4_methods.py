"""How weights are rounded to int4: onnxruntime's own methods, a block of inputs at a time."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from torch import Tensor

SYMMETRIC_ZERO = 8
# A block that a method leaves this much further off than plain rounding is rounded plainly: k_quant loses blocks whose
# weights all have one sign, HQQ those that are much smaller than 1e-3.
WORSE = 2.0


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


def rtn(weight: Tensor, block: int, symmetric: bool = True) -> Packed:
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


def rtn_asymmetric(weight: Tensor, block: int) -> Packed:
    return rtn(weight, block, symmetric=False)


def hqq(weight: Tensor, block: int) -> Packed:
    q, scales, zeros = _onnxruntime().hqq(weight, bits=4, group_size=block)
    return _sane(weight, block, q.view(*scales.shape, block).to(torch.uint8), scales, zeros)


def k_quant(weight: Tensor, block: int) -> Packed:
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

    found, plain = pack(q, scales, zeros), rtn_asymmetric(weight, block)
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


METHODS: dict[str, Callable[[Tensor, int], Packed]] = {
    "rtn": rtn,
    "rtn_asym": rtn_asymmetric,
    "hqq": hqq,
    "k_quant": k_quant,
}

"""Weights as lazy ONNX tensors: each is read, converted and written to the data file on its own, then let go."""

from collections.abc import Callable

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from ir_convert.errors import UserError

from ..finite import require_finite


def lazy_tensor(
    name: str,
    shape: tuple[int, ...],
    read: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    transpose: bool = False,
) -> ir.LazyTensor:
    """Returns a tensor that is read when it is written.

    Args:
        name: the tensor's name, also in error messages.
        shape: the shape that ``read`` must return.
        read: returns the tensor.
        dtype: what it is converted to.
        transpose: whether to store it transposed, as MatMul wants a Linear's ``[out, in]`` weight.

    Raises:
        UserError: (when read) the shape is another one, or a value is not finite in ``dtype``.
    """

    def load() -> ir.TensorProtocol:
        tensor = read()
        if tuple(tensor.shape) != shape:
            raise UserError(f"tensor '{name}' has shape {list(tensor.shape)}; {list(shape)} was expected")
        stored = tensor.T if transpose else tensor
        # Transposed where numbers are narrower: it is memory that takes the time.
        wider = dtype.itemsize > tensor.dtype.itemsize
        stored = stored.contiguous().to(dtype) if wider else stored.to(dtype).contiguous()
        return ir.tensor(require_finite(name, stored))

    return ir.LazyTensor(
        load, dtype=from_torch_dtype(dtype), shape=ir.Shape(shape[::-1] if transpose else shape), name=name
    )

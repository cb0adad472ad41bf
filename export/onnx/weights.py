"""Weights as lazy ONNX tensors: each is read, converted and written to the data file piece by piece, then let go."""

import os
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import BinaryIO

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from ir_convert.errors import UserError

from ..finite import require_finite

# Numbers converted together. What is written from a processor's cache, by memory that is used again, takes the system a third
# of the time that it takes with whole tensors.
PIECE = 1 << 18
COLUMNS = 64  # at least, of a transposed piece: whole lines of the cache are read
BEHIND = 1 << 24  # bytes of a tensor that are written before they are sent to the disk


class LazyWeight(ir.LazyTensor):
    """A tensor that is read when it is written, and whose new precision is never whole in memory.

    Args:
        name: the tensor's name, also in error messages.
        shape: the shape that ``read`` must return.
        read: returns the tensor.
        dtype: what it is converted to.
        transpose: whether to store it transposed, as MatMul wants a Linear's ``[out, in]`` weight.

    Raises:
        UserError: (when read) the shape is another one, or a value is not finite in ``dtype``.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
        dtype: torch.dtype,
        transpose: bool = False,
    ) -> None:
        self._expected, self._read, self._to, self._transpose = shape, read, dtype, transpose
        stored = ir.Shape(shape[::-1] if transpose else shape)
        super().__init__(lambda: self._whole(), dtype=from_torch_dtype(dtype), shape=stored, name=name)

    def tofile(self, file: BinaryIO) -> None:
        """Writes the tensor's bytes."""
        behind = 0
        for piece in self._pieces():
            behind += file.write(piece.view(-1).view(torch.uint8).numpy().data)
            if behind >= BEHIND:
                behind = 0
                _send_to_disk(file)

    def _whole(self) -> ir.TensorProtocol:
        pieces = [piece.flatten() for piece in self._pieces()]
        return ir.tensor(torch.cat(pieces).view(self._expected[::-1] if self._transpose else self._expected))

    def _pieces(self) -> Iterator[torch.Tensor]:
        """Yields what is stored, in its order: contiguous tensors of any shape."""
        tensor, name = self._read(), str(self.name)
        require_shape(name, tensor, self._expected)
        if self._transpose:
            for columns in tensor.split(max(COLUMNS, PIECE // max(1, len(tensor))), dim=1):
                # torch transposes what is dense several times as fast, and converts halves by way of float32.
                yield require_finite(name, columns.contiguous().float().T.contiguous().to(self._to))
        else:
            for numbers in tensor.contiguous().view(-1).split(PIECE):
                yield require_finite(name, numbers.float().to(self._to))


def by_parts(make: Callable[[], Mapping[str, torch.Tensor]]) -> Callable[[str], torch.Tensor]:
    """Returns what gives a quantised weight's parts by their names, to the several threads that write them.

    ``make`` reads and quantises, once if all parts are taken before any is again; what is not taken yet stays in memory.
    """
    waiting: dict[str, torch.Tensor] = {}
    lock = Lock()

    def take(part: str) -> torch.Tensor:
        with lock:
            if part not in waiting:
                waiting.update(make())
            return waiting.pop(part)

    return take


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the tensor, or raises UserError where its shape is another one."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"tensor '{name}' has shape {list(tensor.shape)}; {list(shape)} was expected")
    return tensor


def _send_to_disk(file: BinaryIO) -> None:
    """Begins to write to the disk what a file got, and lets what is there out of the system's cache.

    A large model would else push all other files out of memory, and the system would look for new memory all the time: where
    that is a virtual machine's, it takes several times as long as to write.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        file.flush()
        os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)

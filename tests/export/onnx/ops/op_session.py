"""One unit in an ONNX Runtime session, its inputs and outputs bound to memory of the CPU or of a GPU."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from op_units import TYPES, Unit

CUDA = "CUDAExecutionProvider"
# The provider over a stand-in for CUDA (.ci/emulate): a device's memory is the host's.
EMULATED = bool(os.environ.get("IR_EMULATED"))


class Session:
    """A session whose buffers stay where they are from run to run.

    Args:
        unit: what it is for; others of the same shapes can be run too, but for weights that are part of the model.
        library: of native kernels; None for the function's body.
        constant: makes the weights part of the model, where they are inputs otherwise.
        threads: of the CPU.
        device: ``cpu`` or ``cuda``.
        graph: captures a CUDA graph in the first run, and replays it in all others.
    """

    def __init__(
        self, unit: Unit, library: Path | None, constant: bool = False, threads: int = 1, device: str = "cpu",
        graph: bool = False,
    ) -> None:  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        if library is not None:
            options.register_custom_ops_library(str(library))
        provider = (CUDA, {"enable_cuda_graph": str(int(graph))}) if device == "cuda" else "CPUExecutionProvider"
        self._session = ort.InferenceSession(unit.model(constant), options, providers=[provider])
        self._binding, self._device = self._session.io_binding(), device
        given = [value.name for value in self._session.get_inputs()]
        self._inputs = {name: self._tensor(unit.inputs[name], name) for name in given}
        self._outputs = [
            self._inputs[past] if past and unit.in_place else self._tensor(poison)
            for past, poison in zip(unit.pasts(), unit.poisoned(), strict=True)
        ]
        for name, tensor in self._inputs.items():
            self._bind(self._binding.bind_input, name, tensor, unit.inputs[name])
        for value, tensor, like in zip(self._session.get_outputs(), self._outputs, unit.poisoned(), strict=True):
            self._bind(self._binding.bind_output, value.name, tensor, like)

    def run(self, unit: Unit) -> list[NDArray]:
        """Returns the outputs, which are poisoned before; a past with room is the present too."""
        for past, tensor, poison in zip(unit.pasts(), self._outputs, unit.poisoned(), strict=True):
            if not (past and unit.in_place):
                tensor.copy_(_torch(poison))
        for name, tensor in self._inputs.items():
            tensor.copy_(_torch(unit.inputs[name]))
        if self._device == "cuda" and not EMULATED:
            torch.cuda.synchronize()
        self._session.run_with_iobinding(self._binding)
        return [_numpy(tensor.cpu(), like) for tensor, like in zip(self._outputs, unit.poisoned(), strict=True)]

    def _tensor(self, array: NDArray, name: str = "") -> torch.Tensor:
        return _torch(array).to("cpu" if EMULATED else self._place(name), copy=True)

    def _place(self, name: str) -> str:
        """Returns the device whose memory a tensor is wanted in: of some, by every provider, the CPU's."""
        return "cpu" if name in ("total", "step") else self._device

    def _bind(self, bind, name: str, tensor: torch.Tensor, like: NDArray) -> None:
        bind(name, self._place(name), 0, int(TYPES[like.dtype]), list(tensor.shape), tensor.data_ptr())


def _torch(array: NDArray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    known = array.dtype.kind != "V" and array.dtype.name != "bfloat16"
    return torch.from_numpy(array) if known else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _numpy(tensor: torch.Tensor, like: NDArray) -> NDArray:
    return (
        tensor.view(torch.int16).numpy().view(like.dtype) if tensor.dtype == torch.bfloat16 else tensor.numpy().copy()
    )

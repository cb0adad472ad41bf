"""ONNX Runtime's names for types and devices, in the terms of those who allocate."""

import numpy as np
import onnx
import onnxruntime as ort

from .gpu import CUDA

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ELEMENTS = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
}


def device_of(session: ort.InferenceSession) -> tuple[str, int]:
    """Returns where a session computes: (``cuda`` or ``cpu``, device number)."""
    options = session.get_provider_options()
    if (cuda := options.get(CUDA)) is not None:
        return "cuda", int(cuda.get("device_id", 0))
    return "cpu", 0

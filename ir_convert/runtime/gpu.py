"""The GPU, as torch sees it."""

import ctypes
import sys

CUDA = "CUDAExecutionProvider"


def capability() -> tuple[int, int] | None:
    """Returns the first GPU's compute capability; None where torch has no GPU to use.

    Torch takes seconds and hundreds of MB to import, so it is asked where it is there already, or where a GPU may be. It loads
    the CUDA libraries that it brings along, and there ONNX Runtime finds them.
    """
    if "torch" not in sys.modules and not _has_driver():
        return None
    import torch

    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True

"""The GPU, as torch sees it."""

import ctypes
import sys
from types import ModuleType

CUDA = "CUDAExecutionProvider"


def cuda() -> ModuleType | None:
    """Returns ``torch.cuda``; None where torch has no GPU to use.

    Torch takes seconds and hundreds of MB to import, so it is asked where it is there already, or where a GPU may be. It loads
    the CUDA libraries that it brings along, and there ONNX Runtime finds them.
    """
    if "torch" not in sys.modules and not _has_driver():
        return None
    import torch

    return torch.cuda if torch.cuda.is_available() else None


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True

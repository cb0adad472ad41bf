"""Native kernels for the units' functions: a library that ONNX Runtime loads, built from the sources in this folder.

A model is whole without it: its functions run in standard operators. Where the library is registered, its kernels replace
the functions of domain ``ir``; docs/native-kernels.md says which.
"""

from .building import build
from .library import BUILD, VARIABLE, find, level, supported

__all__ = ["BUILD", "VARIABLE", "build", "find", "level", "supported"]

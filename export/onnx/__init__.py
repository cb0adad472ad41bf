"""ONNX export: the routed decoder, its weights, and the files that ONNX Runtime users expect beside it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .writer import check_dtype, check_model, write

__all__ = ["check_dtype", "check_model", "write"]


def __getattr__(name: str) -> Any:
    """Imports the exporter when it is asked for: ``ir_convert.runtime``, which needs ``ops`` alone, starts seconds sooner."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import writer

    return getattr(writer, name)

"""The Hugging Face export: a checkpoint that ``AutoModelForCausalLM`` loads, and the code that travels with it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loader import load, load_tokenizer
    from .writer import write

__all__ = ["load", "load_tokenizer", "write"]

# What travels with a checkpoint.
CODE = (
    *("configuration_ir.py", "modeling_ir.py", "mixtures_ir.py"),
    *("informed_ir.py", "attention_ir.py", "routed_ir.py", "control_ir.py"),
)


def __getattr__(name: str) -> Any:
    """Imports loader and writer when they are asked for: they import the models of transformers, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loader, writer

    return getattr(writer if name == "write" else loader, name)

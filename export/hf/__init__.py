"""The Hugging Face export: a checkpoint that ``AutoModelForCausalLM`` loads, and the code that travels with it."""

from .loader import load, load_tokenizer
from .writer import write

__all__ = ["load", "load_tokenizer", "write"]

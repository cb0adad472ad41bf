"""Calibration: text and a base model in, a routing out."""

from .local import calibrate
from .text import Blocks, read_blocks

__all__ = ["Blocks", "calibrate", "read_blocks"]

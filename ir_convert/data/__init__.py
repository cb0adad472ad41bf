"""Calibration text: from files, folders and data sets to token blocks."""

from .blocks import Blocks, read_blocks
from .sources import Source

__all__ = ["Blocks", "Source", "read_blocks"]

"""Calibration: text and a base model in, a routing out."""

from .calibrate import calibrate
from .options import Options

__all__ = ["Options", "calibrate"]

"""End-to-end training of routing, on one process or many: the published recipe, LoRA on top of it, and a short polish."""

from .gates import Gates
from .lora import train_lora
from .model import RoutedModel
from .paper import train_paper, uniform_shapes
from .polish import train_polish
from .train import Descent, Trace, cut

__all__ = [
    "Descent",
    "Gates",
    "RoutedModel",
    "Trace",
    "cut",
    "train_lora",
    "train_paper",
    "train_polish",
    "uniform_shapes",
]

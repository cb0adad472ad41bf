"""An exported checkpoint, a dense reference for what it should compute, and token ids to feed them."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ir_convert.checkpoint import Checkpoint
from ir_convert.families import UNITS
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit, merge


class DenseUnit(nn.Module):
    """A base unit that computes everything and then chooses, token by token."""

    def __init__(self, unit: nn.Module, routed: RoutedUnit) -> None:
        super().__init__()
        self.unit, self.routed, self.threshold = unit, routed, -math.inf
        self.scores: Tensor = torch.empty(0)

    def forward(self, *args, hidden_states=None, **kwargs):
        h = args[0] if args else hidden_states
        output = self.unit(*args, **({} if args else {"hidden_states": h}), **kwargs)
        self.scores = self.routed.router(h)
        chosen = merge(
            self.scores > self.threshold, output[0] if isinstance(output, tuple) else output, self.routed.forecaster(h)
        )
        return (chosen, None) if isinstance(output, tuple) else chosen


@dataclass
class Exported:
    name: str
    base: PreTrainedModel
    model: PreTrainedModel
    reference: PreTrainedModel
    checkpoint: Checkpoint
    routing: Routing
    folder: Path

    def units(self) -> dict[tuple[int, str], DenseUnit]:
        """The reference's units, by (layer, unit)."""
        return {
            (index, unit): getattr(layer, self.checkpoint.family.unit(unit).module)
            for index, layer in enumerate(self.reference.model.layers)
            for unit in UNITS
        }

    def set_threshold(self, threshold: float) -> None:
        self.model.config.routing_threshold = threshold
        for unit in self.units().values():
            unit.threshold = threshold


def dense_reference(base: PreTrainedModel, routing: Routing) -> PreTrainedModel:
    reference = copy.deepcopy(base)
    for index, layer in enumerate(reference.model.layers):
        layer.self_attn = DenseUnit(layer.self_attn, routing.units[index, "attention"])
        layer.mlp = DenseUnit(layer.mlp, routing.units[index, "mlp"])
    return reference


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(seed))

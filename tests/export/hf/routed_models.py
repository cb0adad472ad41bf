"""An exported checkpoint, a dense reference for what it should compute, and token ids to feed them."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write
from ir_convert.families import FAMILIES, UNITS, Unit
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit, merge


class DenseUnit(nn.Module):
    """A base unit that computes everything and then chooses, token by token; takes its layer's post norm, if there is one."""

    def __init__(self, layer: nn.Module, places: Unit, routed: RoutedUnit, eps: float) -> None:
        super().__init__()
        self.unit, self.routed, self.threshold = getattr(layer, places.module), routed, -math.inf
        self.bare, self.eps, self.factor = places.norm is None, eps, getattr(layer, "residual_multiplier", 1.0)
        for name in ("is_sliding", "attention_type"):  # by which layers and models of transformers 4 choose a mask
            setattr(self, name, getattr(self.unit, name, None))
        self.post_norm: nn.Module = nn.Identity()
        if places.post_norm is not None:
            self.post_norm = getattr(layer, places.post_norm)
            setattr(layer, places.post_norm, nn.Identity())
        self.scores: Tensor = torch.empty(0)

    def forward(self, *args, hidden_states=None, **kwargs):
        seen = args[0] if args else hidden_states
        output = self.unit(*args, **({} if args else {"hidden_states": seen}), **kwargs)
        added = self.factor * self.post_norm(output[0] if isinstance(output, tuple) else output)
        h = nn.functional.rms_norm(seen, seen.shape[-1:], eps=self.eps) if self.bare else seen
        self.scores = self.routed.router(h)
        chosen = merge(self.scores > self.threshold, added, self.routed.forecaster(h)) / self.factor
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

    @property
    def kernels(self) -> tuple[str, ...]:
        """The attention implementations that compute this model."""
        return ("eager",) if self.base.config._attn_implementation == "eager" else ("sdpa", "eager")

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


def export(made: tuple[str, PreTrainedModel, Checkpoint, Routing], folder: Path) -> Exported:
    """Writes a checkpoint of what ``make_random`` returned into an existing folder, and loads it."""
    name, base, checkpoint, routing = made
    write(checkpoint, routing, folder)
    return Exported(name, base, load(folder).eval(), dense_reference(base, routing), checkpoint, routing, folder)


def write_and_load(checkpoint: Checkpoint, routing: Routing, folder: Path, **options: Any) -> PreTrainedModel:
    """Writes a checkpoint into a new folder, with options of ``write``, and loads it."""
    folder.mkdir()
    write(checkpoint, routing, folder, **options)
    return load(folder).eval()


def dense_reference(base: PreTrainedModel, routing: Routing) -> PreTrainedModel:
    reference = copy.deepcopy(base)
    for index, layer in enumerate(reference.model.layers):
        for unit in UNITS:
            places = FAMILIES[base.config.model_type].unit(unit)
            unit_of_layer = DenseUnit(layer, places, routing.units[index, unit], base.config.rms_norm_eps)
            setattr(layer, places.module, unit_of_layer)
    return reference


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(seed))

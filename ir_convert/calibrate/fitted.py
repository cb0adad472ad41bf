"""What every recipe gives, whatever it did."""

from dataclasses import dataclass, field

from torch import Tensor

from ..checkpoint import Lora
from ..decoder import Decoder
from ..flops import Key
from ..units import Units


@dataclass
class Fitted:
    """What a recipe gives.

    Attributes:
        units: forecaster and router by (layer, unit).
        decoder: the model they are for, LoRA folded in.
        scores: the routers' scores on the dense stream ``[tokens]``; they say where thresholds lie.
        near: a sparsity, and about the threshold that gives it.
        notes: figures for the metadata, by (layer, unit).
        lora: changes of base weights.
    """

    units: Units
    decoder: Decoder
    scores: dict[Key, Tensor]
    near: tuple[float, float]
    notes: dict[Key, dict[str, float]] = field(default_factory=dict)
    lora: Lora = field(default_factory=dict)

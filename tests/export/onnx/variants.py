"""Exports that differ in what is routed, how wide, and what the cache keeps: all that a routing file can ask for."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.routing import Routing
from ir_convert.units import Forecaster, Router

ATTENTIONS = tuple((layer, "attention") for layer in range(3))
MLPS = tuple((layer, "mlp") for layer in range(3))
ADAPTED = ("embed_tokens", "layers.0.self_attn.v_proj", "layers.1.mlp.gate_proj", "layers.2.self_attn.o_proj")


@dataclass
class Variant:
    """A base model and a routing for it.

    Attributes:
        missing: units that are not routed.
        sized: whether every unit has a rank and a router width of its own, the first rank 0.
        adapted: whether base weights are changed.
    """

    family: str
    kv_cache: str = "full"
    missing: tuple[tuple[int, str], ...] = ()
    sized: bool = False
    adapted: bool = False

    def make(self, path: Path) -> tuple[Checkpoint, Routing]:
        """Writes the base model to an empty folder."""
        save_random(self.family, path)
        checkpoint = Checkpoint.open(str(path))
        routing = random_routing(checkpoint, kv_cache=self.kv_cache)
        units = {key: unit for key, unit in routing.units.items() if key not in self.missing}
        routing = replace(routing, units=units)
        if self.sized:
            give_sizes(routing)
        if self.adapted:
            torch.manual_seed(0)
            for name in (f"model.{place}.weight" for place in ADAPTED):
                outputs, inputs = checkpoint.read(name).shape
                routing.lora[name] = (torch.randn(2, inputs) * inputs**-0.5, torch.randn(outputs, 2) * 0.5)
        return checkpoint, routing


VARIANTS = {
    "only the MLPs": Variant("llama", missing=ATTENTIONS),
    "only the attentions": Variant("qwen2", missing=MLPS),
    "one unit is not": Variant("mistral-sliding", missing=((1, "attention"),)),
    "own sizes": Variant("llama-bias", sized=True),
    "adapted": Variant("qwen3", adapted=True),
    "strict": Variant("qwen3", "strict"),
    "strict, sliding": Variant("mistral-sliding", "strict"),
    "strict, two are not": Variant("llama-bias", "strict", missing=((1, "attention"), (2, "mlp"))),
    "strict, soft-capped": Variant("gemma2", "strict", missing=((2, "attention"),)),
    "strict, two rotations": Variant("gemma3", "strict"),
    "strict, no norms before": Variant("olmo2", "strict", missing=((1, "attention"), (0, "mlp"))),
    "strict, not rotated": Variant("smollm3", "strict"),
    "packed, one is not": Variant("phi3", missing=((0, "mlp"), (2, "attention"))),
    "scaled, two are not": Variant("granite", missing=((1, "mlp"), (1, "attention"))),
    "experts, one is not": Variant("qwen3_moe", "strict", missing=((1, "mlp"),)),
    "strict, all of it": Variant("qwen2", "strict", missing=((0, "attention"),), sized=True, adapted=True),
}


def give_sizes(routing: Routing) -> None:
    """Gives the first routed unit rank 0 and router width 2, the next rank 1 and width 3, and so on."""
    torch.manual_seed(0)
    for size, (key, unit) in enumerate(routing.units.items()):
        d, width = len(unit.forecaster.bias), size + 2
        down, up = torch.randn(size, d) * d**-0.5, torch.randn(d, size) * 0.4
        forecaster = Forecaster(down, torch.randn(size), up, torch.randn(d) * 0.1)
        hidden, out = torch.randn(width, d) * d**-0.5, torch.randn(1, width) * 3
        router = Router(hidden, torch.randn(width), out, torch.randn(1) * 0.3)
        routing.units[key] = replace(unit, forecaster=forecaster, router=router)

"""What a calibration may be told."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ..choices import KV_CACHES, RECIPES
from ..curve import require_share
from ..errors import UserError
from ..families import UNITS
from ..flops import Budget


@dataclass(frozen=True)
class Options:
    """Options of a calibration; each is a flag of the command.

    Attributes:
        recipe: ``local`` (streamed, layer by layer), ``paper`` (the published one, trained end to end), or ``greedy``
            (no forecasters, routers trained end to end: the baseline).
        sparsity: share of FLOPs to save by default, in [0, 1).
        units: which units are routed.
        rank: mean rank of the forecasters; None by the model's width. The local recipe spends the same FLOPs unevenly.
        router_width: hidden units of the routers; None by the model's width.
        kv_cache: ``full``: approximated tokens leave keys and values, too. ``strict``: they leave none.
        polish: end-to-end steps after the recipe, towards the predictions of the model with all units (LoRA's changes included).
        lora: of the paper recipe: adapt the base weights last.
        steps: of each stage of the paper and greedy recipes.
        seed: of everything drawn at random.
        gradient_checkpointing: of end-to-end stages: one block at a time, of which they keep layers' inputs alone and compute
            the rest again. The result is the same to rounding.
    """

    recipe: str = "local"
    sparsity: float = 0.4
    units: tuple[str, ...] = UNITS
    rank: int | None = None
    router_width: int | None = None
    kv_cache: str = "full"
    polish: int = 0
    lora: bool = False
    steps: int = 2000
    seed: int = 0
    gradient_checkpointing: bool = False

    def settled(self, config: PretrainedConfig) -> "Options":
        """Returns the options with the model's defaults filled in.

        Raises:
            UserError: an option is not possible.
        """
        require_share(self.sparsity)
        for name, value, known in (
            ("recipe", self.recipe, RECIPES),
            ("kv-cache", self.kv_cache, KV_CACHES),
            *(("units", unit, UNITS) for unit in self.units),
        ):
            if value not in known:
                raise UserError(f"--{name} '{value}' is not known: give {' or '.join(known)}")
        if not self.units or len(set(self.units)) < len(self.units):
            raise UserError("--units names no unit, or one twice: give attention,mlp or one of the two")
        if self.lora and self.recipe != "paper":
            raise UserError("--lora is the paper recipe's last stage: give --recipe paper as well")
        if self.recipe == "local" and self.steps != Options.steps:
            raise UserError(
                f"--steps {self.steps} is of the paper and greedy recipes: give one of them, or leave it out"
            )
        if self.recipe == "greedy" and self.rank:
            raise UserError(f"--rank {self.rank} is of forecasters, and the greedy recipe has none: leave it out")
        hidden = config.hidden_size
        rank = default_rank(hidden) if self.rank is None else self.rank
        if rank > hidden:
            raise UserError(f"rank {rank} is more than the model's width, {hidden}: give a smaller --rank")
        width = default_router_width(hidden) if self.router_width is None else self.router_width
        units = tuple(unit for unit in UNITS if unit in self.units)
        return replace(self, rank=0 if self.recipe == "greedy" else rank, router_width=width, units=units)

    @property
    def shape(self) -> tuple[int, int]:
        """Mean rank of the forecasters and width of the routers, of settled options."""
        if self.rank is None or self.router_width is None:
            raise ValueError("these options are not settled for a model yet")
        return self.rank, self.router_width

    def budget(self, config: PretrainedConfig) -> Budget:
        """Returns what a model of these settled options may save."""
        shapes = {(layer, unit): self.shape for layer in range(config.num_hidden_layers) for unit in self.units}
        return Budget.of_shapes(config, shapes, self.kv_cache)

    def as_dict(self) -> dict[str, Any]:
        """Returns what decides the result."""
        values = asdict(self) | {"units": list(self.units)}
        del values["gradient_checkpointing"]
        return values


def default_rank(hidden: int) -> int:
    """The published rank is about 100 of 4096; narrower models need relatively more and can afford less."""
    return max(8, min(100, hidden // 16))


def default_router_width(hidden: int) -> int:
    return max(4, min(32, hidden // 24))

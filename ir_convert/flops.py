"""What sparsity means here: the share of FLOPs saved, forecaster and router cost subtracted.

The base is the dense decoder layers' linear projections, per token (2 * inputs * outputs FLOPs each); embeddings, lm_head
and the attention core are left out. With a full KV cache, K and V run for every token, so an approximated attention token
saves its q and o projections; with a strict one it saves all four. Beside it stands the share of decisions: the plain mean
of approximated (token, unit) pairs over all units of the model, those that are not routed included.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from .families import UNITS, family_of, projection_sizes
from .units import Units

Key = tuple[int, str]


@dataclass(frozen=True)
class Budget:
    """FLOPs per token, and what routing saves and costs.

    Attributes:
        dense: all linear projections of one layer.
        saved: what one approximated token saves, by unit.
        overhead: forecaster and router of each routed unit, paid for every token, by (layer, unit).
        layers: number of decoder layers.
    """

    dense: int
    saved: dict[str, int]
    overhead: dict[Key, int]
    layers: int

    @classmethod
    def of(cls, config: PretrainedConfig, units: Units, kv_cache: str = "full") -> "Budget":
        """Returns the budget of a model whose routed units are these."""
        shapes = {key: (routed.forecaster.rank, routed.router.width) for key, routed in units.items()}
        return cls.of_shapes(config, shapes, kv_cache)

    @classmethod
    def of_shapes(
        cls, config: PretrainedConfig, shapes: Mapping[Key, tuple[int, int]], kv_cache: str = "full"
    ) -> "Budget":
        """Returns the budget of routed units of these (forecaster rank, router width)."""
        family, sizes, d = family_of(config), projection_sizes(config), config.hidden_size
        cost = {name: 2 * inputs * outputs for name, (inputs, outputs) in sizes.items()}
        saved = {}
        for unit in UNITS:
            places = family.unit(unit)
            skipped = places.skipped + (places.kept if kv_cache == "strict" else ())
            saved[unit] = sum(cost[name] for name in skipped)
        return cls(
            dense=sum(cost.values()),
            saved=saved,
            overhead={key: forecaster_flops(d, rank) + router_flops(d, width) for key, (rank, width) in shapes.items()},
            layers=config.num_hidden_layers,
        )

    def share(self, unit: str) -> float:
        """Returns the share of the model's FLOPs that one unit of one layer saves where it is approximated."""
        return self.saved[unit] / (self.dense * self.layers)

    @property
    def overhead_share(self) -> float:
        """The share of the dense FLOPs that forecasters and routers add."""
        return sum(self.overhead.values()) / (self.dense * self.layers)

    @property
    def reachable(self) -> float:
        """The sparsity of a model that approximates every unit it routes."""
        return sum(self.share(unit) for _, unit in self.overhead) - self.overhead_share

    def sparsity(self, approximated: Mapping[Key, float]) -> float:
        """Returns the share of FLOPs saved, from the share of tokens approximated in each routed (layer, unit)."""
        return sum(self.share(unit) * rate for (_, unit), rate in approximated.items()) - self.overhead_share

    def decisions(self, approximated: Mapping[Key, float]) -> float:
        """Returns the share of decisions that approximate; units that are not routed always execute."""
        return sum(approximated.values()) / (len(UNITS) * self.layers)


def forecaster_flops(hidden: int, rank: int) -> int:
    """FLOPs per token of a forecaster."""
    return 2 * (2 * hidden * rank)


def router_flops(hidden: int, width: int) -> int:
    """FLOPs per token of a router."""
    return 2 * (hidden + 1) * width

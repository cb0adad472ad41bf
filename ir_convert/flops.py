"""What sparsity means here: the share of FLOPs saved, forecaster and router cost subtracted.

The base is the dense decoder layers' linear projections, per token (2 * inputs * outputs FLOPs each); embeddings, lm_head
and the attention core are left out. K and V run for every token, so an approximated attention token saves its q and o
projections. Beside it stands the share of decisions: the plain mean of approximated (token, unit) pairs.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from .families import UNITS, family_of, projection_sizes


@dataclass(frozen=True)
class Budget:
    """FLOPs per token of one decoder layer, and what routing saves and costs there.

    Attributes:
        dense: all linear projections of a layer.
        saved: what one approximated token saves, by unit.
        overhead: forecaster and router of one unit, paid for every token.
        layers: number of decoder layers.
    """

    dense: int
    saved: dict[str, int]
    overhead: int
    layers: int

    @classmethod
    def of(cls, config: PretrainedConfig, rank: int, router_width: int) -> "Budget":
        family, sizes = family_of(config), projection_sizes(config)
        cost = {name: 2 * inputs * outputs for name, (inputs, outputs) in sizes.items()}
        overhead = 2 * (2 * config.hidden_size * rank) + 2 * (config.hidden_size + 1) * router_width
        return cls(
            dense=sum(cost.values()),
            saved={unit: sum(cost[name] for name in family.unit(unit).skipped) for unit in UNITS},
            overhead=overhead,
            layers=config.num_hidden_layers,
        )

    def share(self, unit: str) -> float:
        """Returns the share of the model's FLOPs that one unit of one layer saves where it is approximated."""
        return self.saved[unit] / (self.dense * self.layers)

    @property
    def overhead_share(self) -> float:
        """The share of the dense FLOPs that forecasters and routers add."""
        return len(UNITS) * self.overhead / self.dense

    @property
    def reachable(self) -> float:
        """The sparsity of a model that approximates everything."""
        return sum(self.saved.values()) / self.dense - self.overhead_share

    def sparsity(self, approximated: dict[tuple[int, str], float]) -> float:
        """Returns the share of FLOPs saved, from the share of tokens approximated in each (layer, unit)."""
        return sum(self.share(unit) * rate for (_, unit), rate in approximated.items()) - self.overhead_share

    def decisions(self, approximated: dict[tuple[int, str], float]) -> float:
        """Returns the share of decisions that approximate."""
        return sum(approximated.values()) / len(approximated)

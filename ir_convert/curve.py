"""What can be asked for: sparsity against threshold. Apart from the routing file, so that a runtime need not load torch."""

import math
from dataclasses import dataclass

import numpy as np

from .errors import UserError


@dataclass
class Curve:
    """Sparsity against threshold, measured on held-out text. Both rise strictly."""

    sparsity: list[float]
    threshold: list[float]

    def at(self, sparsity: float) -> float:
        """Returns the threshold that saves ``sparsity`` of the FLOPs; -inf (the dense model) for 0.

        Raises:
            UserError: it is no share, or no threshold saves that much.
        """
        require_share(sparsity)
        if sparsity == 0:
            return -math.inf
        if sparsity > self.sparsity[-1] + 1e-9:
            raise UserError(
                f"sparsity {sparsity:g} is out of reach; this routing reaches {within_reach(self.sparsity[-1]):.3f}"
            )
        return float(np.float32(np.interp(sparsity, self.sparsity, self.threshold)))


def within_reach(sparsity: float) -> float:
    """Returns the most that can be saved as messages name it: rounded down, or what they name would be refused."""
    return math.floor(sparsity * 1000) / 1000


def require_share(sparsity: float) -> None:
    """Raises UserError where a sparsity is no share of the FLOPs."""
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity:g} is not in [0, 1): it is the share of FLOPs to save, e.g. 0.4")

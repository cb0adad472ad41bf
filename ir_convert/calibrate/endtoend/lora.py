"""The published recipe's last, optional stage: low-rank changes of base weights, trained under a routing that stays fixed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...checkpoint import Checkpoint, Lora
from ...families import UNITS
from ...flops import Budget
from ...progress import Reporter
from ...units import Units
from .gates import Gates
from .model import RoutedModel
from .objective import Objective, train_routed
from .train import Descent, Trace
from .workers import Workers

LORA = Descent(steps=2000, batch=16, lr=2e-4)
PROJECTIONS, ALPHA = ("q_proj", "v_proj", "gate_proj"), 32.0


class Adapted(nn.Module):
    """A frozen linear projection plus scale * B A; starts at the projection itself, B being 0."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        device, width = linear.weight.device, linear.in_features
        a = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        self.linear, self._scale = linear, scale
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x.float(), self.a), self.b * self._scale)
        return self.linear(x) + change.to(x.dtype)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns A and B, the scale in B, fp32 on the CPU."""
        return self.a.detach().to("cpu", copy=True), (self.b.detach() * self._scale).cpu()


class Adapters:
    """The adapted projections of one model, put in place as it loads.

    Args:
        projections: names of the projections to adapt in every layer.
        rank: of the changes.
        alpha: the changes are scaled by alpha / rank.
        seed: of A.
    """

    def __init__(
        self, checkpoint: Checkpoint, projections: tuple[str, ...], rank: int, alpha: float, seed: int
    ) -> None:
        self._family, self._projections = checkpoint.family, projections
        self._rank, self._scale = rank, alpha / rank
        self._generator = torch.Generator().manual_seed(seed)
        self.modules: dict[str, Adapted] = {}

    def adapt(self, index: int, layer: nn.Module) -> None:
        """Replaces a loaded decoder layer's projections; a ``RoutedModel`` calls this."""
        for unit in UNITS:
            place = self._family.unit(unit)
            module = getattr(layer, place.module)
            module = getattr(module, "inner", module)  # inside the routed unit, where the unit is routed
            packed = {part: tensor for tensor, parts in place.packed.items() for part in parts}
            # Projections in one tensor change together. Experts stay as they are.
            names = {packed.get(name, name) for name in self._projections if name in (*place.skipped, *place.kept)}
            for name, linear in list(module.named_children()):
                if name in names and isinstance(linear, nn.Linear):
                    adapted = Adapted(linear, self._rank, self._scale, self._generator)
                    setattr(module, name, adapted)
                    self.modules[f"{self._family.layers}.{index}.{place.module}.{name}.weight"] = adapted

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in (module.a, module.b)]

    def folded(self) -> Lora:
        return {name: module.folded() for name, module in self.modules.items()}


def train_lora(
    checkpoint: Checkpoint,
    units: Units,
    fit_blocks: Tensor,
    *,
    threshold: float,
    kv_cache: str = "full",
    rank: int = 16,
    descent: Descent = LORA,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Reporter | None = None,
) -> tuple[Lora, Trace]:
    """Adapts base weights to a routing: LM cross-entropy, everything else frozen (arXiv 2510.13831: r 16, alpha 32, lr 2e-4).

    Decisions are those of inference, at a threshold set beforehand, and pass no gradient. The changes move hidden states,
    so set the threshold again afterwards, on ``checkpoint.with_lora(lora)``.

    Args:
        units: forecasters and routers, frozen.
        fit_blocks: token blocks ``[blocks, sequence]``, the same on every process.
        threshold: execute where score > threshold.
        rank: of the changes to each layer's ``PROJECTIONS``.

    Returns:
        The changes, as ``Routing.lora`` has them (fp32, CPU; the scale is in B), and what the stage saw.

    Raises:
        UserError: the loss is NaN or infinite, or the processes cannot share a batch.
    """
    workers = Workers(device)
    adapters = Adapters(checkpoint, PROJECTIONS, rank, ALPHA, seed)
    model = RoutedModel(
        checkpoint,
        units,
        kv_cache=kv_cache,
        device=workers.device,
        gradient_checkpointing=gradient_checkpointing,
        adapt=adapters.adapt,
        shard=workers.shard(),
    )
    trace = train_routed(
        "LoRA",
        model,
        [(adapters.parameters(), descent.lr)],
        fit_blocks,
        Objective(),
        lambda _: Gates("hard", threshold),
        descent,
        budget=Budget.of(checkpoint.config, units, kv_cache),
        seed=seed,
        workers=workers,
        report=workers.reporter(report),
    )
    return adapters.folded(), trace

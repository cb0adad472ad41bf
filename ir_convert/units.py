"""The mathematics of informed routing: forecaster, router, and the routed unit. Nothing else.

A pretrained unit (attention or MLP) does ``x <- x + unit(h)`` with ``h = norm(x)``. Routed, each token does

    x <- x + (unit(h) if score(h) > threshold else forecast(h))

Here ``unit`` stands for all that is added to the stream: what comes after attention or MLP, a norm or a factor, belongs to it
(families.py).

- forecast(h) = U @ silu(D @ h + a) + b: a forecaster (LFF) of the unit's output through a bottleneck of width r, its rank.
- score(h) = v @ silu(W @ h + b) + c: the log of what approximating this token here is expected to cost, per FLOP saved.

One threshold serves the whole model; at -inf every token executes and the model is the dense one. A unit may also be left
unrouted: it has neither forecaster nor router, and always runs.
Method: informed routing, arXiv 2510.13831; closed-form forecasters and cost-regressed routers are this project's.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Forecaster:
    """Maps normalised hidden states to the unit's output through a bottleneck. Rank 0 forecasts its bias.

    Attributes:
        down: ``[rank, hidden]``.
        down_bias: ``[rank]``.
        up: ``[hidden, rank]``.
        bias: ``[hidden]``.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """Forecasts the unit's output for normalised hidden states ``[..., hidden]``."""
        return F.linear(F.silu(F.linear(h, self.down, self.down_bias)), self.up, self.bias)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, factor: float) -> "Forecaster":
        """Returns one whose forecasts are ``factor`` times as large."""
        return replace(self, up=self.up * factor, bias=self.bias * factor)


@dataclass
class Router:
    """A one-hidden-layer MLP from normalised hidden states to a score.

    Attributes:
        hidden: ``[width, hidden]``.
        hidden_bias: ``[width]``.
        out: ``[1, width]``.
        out_bias: ``[1]``; holds minus the log of the unit's share of the FLOPs, which makes one threshold fit all units.
    """

    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @property
    def width(self) -> int:
        return self.hidden.shape[0]

    def __call__(self, h: Tensor) -> Tensor:
        """Scores normalised hidden states ``[..., hidden]`` -> ``[...]``."""
        return F.linear(F.silu(F.linear(h, self.hidden, self.hidden_bias)), self.out, self.out_bias).squeeze(-1)


@dataclass
class RoutedUnit:
    """What routing adds to one unit."""

    forecaster: Forecaster
    router: Router

    def execute(self, h: Tensor, threshold: float) -> Tensor:
        """Decides for normalised hidden states ``[..., hidden]`` -> bool ``[...]``, True where the unit is to run."""
        return self.router(h) > threshold

    def tensors(self) -> dict[str, Tensor]:
        """Returns the unit's tensors by dotted name, e.g. ``forecaster.down``."""
        return {
            f"{part}.{field.name}": getattr(getattr(self, part), field.name)
            for part, kind in _PARTS.items()
            for field in fields(kind)
        }

    def fits_together(self) -> bool:
        """Tells whether all tensors have the shapes that rank, width and hidden size give them."""
        f, r, hidden = self.forecaster, self.router, len(self.forecaster.bias)
        return [tuple(tensor.shape) for tensor in (*vars(f).values(), *vars(r).values())] == [
            *((f.rank, hidden), (f.rank,), (hidden, f.rank), (hidden,)),
            *((r.width, hidden), (r.width,), (1, r.width), (1,)),
        ]

    def to(self, device: torch.device) -> "RoutedUnit":
        """Returns a copy on another device."""
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "RoutedUnit":
        """The inverse of ``tensors``."""
        forecaster, router = (
            [tensors[f"{part}.{field.name}"] for field in fields(kind)] for part, kind in _PARTS.items()
        )
        return cls(Forecaster(*forecaster), Router(*router))


_PARTS: dict[str, type[Forecaster] | type[Router]] = {"forecaster": Forecaster, "router": Router}

# By (layer, unit); a unit that is missing is not routed.
Units = dict[tuple[int, str], RoutedUnit]


def units_to_tensors(units: Units) -> dict[str, Tensor]:
    """Returns every unit's tensors by name, e.g. ``3.mlp.forecaster.down``."""
    return {f"{layer}.{unit}.{name}": t for (layer, unit), u in units.items() for name, t in u.tensors().items()}


def units_from_tensors(tensors: dict[str, Tensor]) -> Units:
    """The inverse of ``units_to_tensors``, in the order of layers."""
    grouped: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, unit, rest = name.split(".", 2)
        grouped.setdefault((int(layer), unit), {})[rest] = tensor
    return {key: RoutedUnit.from_tensors(grouped[key]) for key in sorted(grouped)}


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """Returns x ``[..., hidden]`` divided by its root mean square, computed in fp32 or better: the RMS norm without weights."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def merge(execute: Tensor, output: Tensor, forecast: Tensor) -> Tensor:
    """Returns the unit's output where ``execute[...]``, the forecast elsewhere; both ``[..., hidden]``."""
    return torch.where(execute.unsqueeze(-1), output, forecast)

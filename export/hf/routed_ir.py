"""The routed units: forecaster, router, and the MLP. This file travels with the checkpoint, see modeling_ir.py."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Where = tuple[Tensor, Tensor]  # rows and columns of tokens in a batch


class Forecaster(nn.Module):
    """Forecasts a unit's output: ``[..., hidden]`` -> ``[..., hidden]``, through a bottleneck."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(F.silu(self.down(h)))


class Router(nn.Module):
    """Scores how much a unit's output would be missed: ``[..., hidden]`` -> ``[...]``, fp32."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, width)
        self.score = nn.Linear(width, 1)  # fp32 in a half-precision model: rounded scores would tie at the threshold

    def forward(self, h: Tensor) -> Tensor:
        hidden = F.silu(self.hidden(h))
        weight = self.score.weight
        if (
            isinstance(weight, Tensor) and weight.is_floating_point()
        ):  # where it is quantized, the layer casts for itself
            hidden = hidden.to(weight.dtype)
        return self.score(hidden).squeeze(-1).float()


@dataclass
class Padding:
    """Which tokens of a call are real: ``[batch, sequence]``; None where all are, or nothing tells.

    It is for counting alone: what is computed must not depend on what the last call happened to be.
    """

    real: Tensor | None = None

    def look(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before a decoder's forward: takes it from a 2-D mask of exactly the tokens that are cached and those that are new."""
        named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        new, mask, cache = named.get("input_ids"), named.get("attention_mask"), named.get("past_key_values")
        cache = named.get("cache") if cache is None else cache  # from version 5.24 of transformers on
        new = named.get("inputs_embeds") if new is None else new
        self.real = None
        if new is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            cached = 0 if cache is None else int(cache.get_seq_length())
            if mask.shape == (new.shape[0], cached + new.shape[1]):
                self.real = mask[:, cached:].bool()


@dataclass
class Count:
    """What one unit did with real tokens: seen, executed, and those that a router was run for (none in a dense model)."""

    tokens: int = 0
    executed: int = 0
    routed: int = 0
    padding: Padding = field(default_factory=Padding, repr=False)

    def add(self, h: Tensor, execute: Tensor | None) -> None:
        """Counts a call on ``h[batch, sequence, hidden]``; execute is None in a dense model, else bool ``[batch, sequence]``."""
        real, tokens = self.padding.real, h.shape[0] * h.shape[1]
        if real is not None and real.shape == h.shape[:2]:
            tokens = int(real.sum())
            execute = None if execute is None else execute & real.to(execute.device)
        self.tokens += tokens
        self.executed += tokens if execute is None else int(execute.sum())
        self.routed += 0 if execute is None else tokens


class PostNorm(nn.Module):
    """Mixed in before a family's norm, where it follows a unit: the unit applies it, to executed tokens alone.

    Where the layer calls it, nothing is left to do.
    """

    def forward(self, output: Tensor, apply: bool = False) -> Tensor:
        return super().forward(output) if apply else output


class RoutedUnit(nn.Module):
    """What attention and MLP share. A forecast is of all that the unit adds to the stream, norm and factor included."""

    skipped: tuple[str, ...]  # those that an approximated token saves
    counts: list[Count]  # one for everyone who observes, see ``routing_statistics``
    config: Any
    normed = True  # whether the layer has a norm before the unit
    post_norm: nn.Module | None = None  # the one that follows, in families that have one
    multiplier = 1.0  # by which the layer multiplies what comes from here

    def add_routing(self, config: Any, layer: int, unit: str) -> None:
        self.counts = []
        rank, width = config.routing_shape(layer, unit)
        self.forecaster = Forecaster(config.hidden_size, rank)
        self.router = Router(config.hidden_size, width)
        self.multiplier = getattr(config, "residual_multiplier", 1.0)

    def take_post_norm(self, norm: nn.Module) -> None:
        """Takes over the norm that follows in the layer, whose weight it stays."""
        object.__setattr__(self, "post_norm", norm)  # not as a submodule: one weight has one name

    def seen(self, x: Tensor) -> Tensor:
        """Returns what forecaster and router see of the unit's input ``[..., hidden]``; where that has no norm, it is scaled to 1."""
        if self.normed:
            return x
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)).to(x.dtype)

    def finished(self, output: Tensor) -> Tensor:
        """Returns what the layer adds to the stream, but for its factor."""
        return output if self.post_norm is None else self.post_norm(output, apply=True)

    def forecast(self, h: Tensor) -> Tensor:
        """Returns the forecast ``[..., hidden]`` as ``finished`` would return what it forecasts."""
        forecast = self.forecaster(h)
        return forecast if self.multiplier == 1 else forecast / self.multiplier

    def executed(self, h: Tensor) -> Where | None:
        """Decides for ``h[batch, sequence, hidden]``: returns the tokens to execute; None where that is all of them."""
        threshold = float(self.config.routing_threshold)
        execute = None if threshold == -math.inf else self.router(h) > threshold
        for count in self.counts:
            count.add(h, execute)
        if execute is None:
            return None
        where = execute.nonzero(as_tuple=True)
        return None if len(where[0]) == execute.numel() else where

    @property
    def saved(self) -> int:
        """FLOPs that an approximated token saves."""
        costs = projection_flops(self.config)
        return sum(costs[name] for name in self.skipped)

    @property
    def overhead(self) -> int:
        """FLOPs of forecaster and router, for every token."""
        linears: list[Any] = [self.forecaster.down, self.forecaster.up, self.router.hidden, self.router.score]
        return sum(2 * linear.in_features * linear.out_features for linear in linears)


def projection_flops(config: Any) -> dict[str, int]:
    """Returns the FLOPs per token of a layer's linear projections, by name; of experts, those that run for one token."""
    d, head = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, f, costs = config.num_attention_heads * head, config.num_key_value_heads * head, config.intermediate_size, {}
    if hasattr(config, "num_experts_per_tok"):
        f = config.num_experts_per_tok * getattr(config, "moe_intermediate_size", f)
        costs = {"gate": 2 * d * config.num_experts}
    attention = {"q_proj": 2 * d * q, "k_proj": 2 * d * kv, "v_proj": 2 * d * kv, "o_proj": 2 * d * q}
    return costs | attention | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2 * d * f)


class RoutedMLP(RoutedUnit):
    """Mixed in before a family's MLP."""

    skipped: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config)
        self.add_routing(config, layer_idx, "mlp")

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = self.seen(hidden_states)
        where = self.executed(h)
        if where is None:
            return self.finished(self._run(hidden_states))
        output = self.forecast(h)
        if len(where[0]):
            output[where] = self.finished(self._run(hidden_states[where][None]))[0].to(output.dtype)  # under autocast
        return output

    def _run(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output[0] if isinstance(output, tuple) else output  # version 4 of transformers adds experts' scores


class RoutedExperts(RoutedMLP):
    """Mixed in before a family's mixture of experts: the gate and all experts are one unit."""

    skipped = ("gate", *RoutedMLP.skipped)

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config = config

"""The routed units: forecaster, router, attention and MLP. This file travels with the checkpoint, see modeling_ir.py."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

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
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


@dataclass
class Count:
    """What one unit did: tokens seen, tokens executed, tokens that a router was run for (none in a dense model)."""

    tokens: int = 0
    executed: int = 0
    routed: int = 0


class RoutedUnit(nn.Module):
    """What attention and MLP share."""

    projections: tuple[str, ...]  # all of the unit's
    skipped: tuple[str, ...]  # those that an approximated token saves
    counts: list[Count]  # one for everyone who observes, see ``routing_statistics``
    config: Any

    def add_routing(self, config: Any, layer: int, unit: str) -> None:
        self.counts = []
        rank, width = config.routing_shape(layer, unit)
        self.forecaster = Forecaster(config.hidden_size, rank)
        self.router = Router(config.hidden_size, width)

    def executed(self, h: Tensor) -> Where | None:
        """Decides for ``h[batch, sequence, hidden]``: returns the tokens to execute; None where that is all of them."""
        threshold = float(self.config.routing_threshold)
        dense = threshold == -math.inf
        where = None if dense else (self.router(h) > threshold).nonzero(as_tuple=True)
        tokens = h.shape[0] * h.shape[1]
        executed = tokens if where is None else len(where[0])
        for count in self.counts:
            count.tokens += tokens
            count.executed += executed
            count.routed += 0 if dense else tokens
        return None if executed == tokens else where

    @property
    def saved(self) -> int:
        """FLOPs that an approximated token saves."""
        return flops(self, *self.skipped)

    @property
    def overhead(self) -> int:
        """FLOPs of forecaster and router, for every token."""
        return flops(self, "forecaster.down", "forecaster.up", "router.hidden", "router.score")


def flops(unit: nn.Module, *names: str) -> int:
    """Returns the FLOPs per token of a unit's linear modules."""
    modules: list[Any] = [unit.get_submodule(name) for name in names]
    return sum(2 * module.in_features * module.out_features for module in modules)


class RoutedMLP(RoutedUnit):
    """Mixed in before a family's MLP."""

    projections = skipped = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config)
        self.add_routing(config, layer_idx, "mlp")

    def forward(self, h: Tensor) -> Tensor:
        where = self.executed(h)
        if where is None:
            return super().forward(h)
        output = self.forecaster(h)
        if len(where[0]):
            output[where] = super().forward(h[where])
        return output


class RoutedAttention(RoutedUnit):
    """Mixed in before a family's attention."""

    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    skipped: tuple[str, ...] = ("q_proj", "o_proj")
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_routing(config, layer_idx, "attention")
        self.strict = config.kv_cache == "strict"
        if self.strict:
            self.skipped = self.projections

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Like the family's; attention weights are returned only where every token executes.

        With a strict KV cache, an approximated token's keys and values are zero, and no token sees a key that is zero in
        every head: the cache itself says who is in it.
        """
        where = self.executed(hidden_states)
        if where is None and self.strict and past_key_values is not None:  # the cache may hold gaps
            rows, columns = hidden_states.new_ones(hidden_states.shape[:2]).nonzero(as_tuple=True)
            where = rows, columns
        if where is None:
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"routed attention runs with 'sdpa' or 'eager', not '{self.config._attn_implementation}'")
        output = self.forecaster(hidden_states)
        keys = self._kept(self.k_proj, "k_norm", hidden_states, where)
        values = self._kept(self.v_proj, "", hidden_states, where)
        cos, sin = position_embeddings
        keys = rotate(keys, cos.unsqueeze(1), sin.unsqueeze(1))
        if past_key_values is not None:
            # Version 4 of transformers places the tokens in a static cache by these.
            place = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            keys, values = past_key_values.update(keys, values, self.layer_idx, place)
        if len(where[0]):
            queries = self._heads(self.q_proj, "q_norm", hidden_states[where])
            cos, sin = (angle.expand(len(hidden_states), -1, -1)[where].unsqueeze(1) for angle in (cos, sin))
            queries = rotate(queries, cos, sin)
            attended = self._attend(queries, keys, values, attention_mask, where, hidden_states.shape[1])
            output[where] = self.o_proj(attended.flatten(1))
        return output, None

    def _heads(self, projection: nn.Module, norm: str, h: Tensor) -> Tensor:
        """Projects ``[..., hidden]`` -> ``[..., heads, head_dim]``, normalised per head in the families that do."""
        heads = projection(h).unflatten(-1, (-1, self.head_dim))
        return getattr(self, norm)(heads) if hasattr(self, norm) else heads

    def _kept(self, projection: nn.Module, norm: str, h: Tensor, where: Where) -> Tensor:
        """Keys or values of the tokens that leave some ``[batch, kv_heads, sequence, head_dim]``, zero elsewhere."""
        if not self.strict:
            return self._heads(projection, norm, h).transpose(1, 2)
        heads = self._heads(projection, norm, h[where])
        kept = heads.new_zeros(*h.shape[:2], *heads.shape[1:])
        kept[where] = heads
        return kept.transpose(1, 2)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, where: Where, length: int
    ) -> Tensor:
        """Attends from executed tokens only.

        Args:
            queries: ``[executed, heads, head_dim]``.
            keys, values: ``[batch, kv_heads, past + length, head_dim]``.
            mask: bool or additive, ``[batch or 1, heads or 1, length, past + length]``. None: a single token sees
                everything, more see themselves and what came before in a cache that was empty.
            where: the executed tokens, in the order of ``queries``.
            length: tokens per row of the batch.

        Returns:
            ``[executed, heads, head_dim]``.
        """
        rows, columns = where
        batch, groups = len(keys), self.num_key_value_groups
        # Rows execute different numbers of tokens: pad them to the longest. Padded queries see what token 0 sees.
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        longest = 1 if length == 1 else int(place.max()) + 1
        padded = queries.new_zeros(batch, longest, *queries.shape[1:])
        padded[rows, place] = queries
        padded = padded.transpose(1, 2)
        positions = columns.new_zeros(batch, longest)
        positions[rows, place] = columns

        if mask is not None:
            every = torch.arange(batch, device=rows.device).unsqueeze(1)
            mask = mask[..., : keys.shape[2]].expand(batch, -1, -1, -1)[every, :, positions].transpose(1, 2)
        elif length > 1:
            keys, values = keys[:, :, :length], values[:, :, :length]
            mask = (positions.unsqueeze(-1) >= torch.arange(length, device=rows.device)).unsqueeze(1)
        if self.strict:
            kept = keys.ne(0).any(-1).any(1)[:, None, None]
            if mask is None:
                mask = kept
            elif mask.dtype == torch.bool:
                mask = mask & kept
            else:
                mask = mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
        if longest == 1 and (mask is None or mask.shape[1] == 1):
            # One query per row: the heads of a group take the place of queries, and the cache is not copied.
            padded = padded.reshape(batch, -1, groups, self.head_dim)
        else:
            keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            padded, keys, values, attn_mask=mask, dropout_p=dropout, scale=self.scaling
        )
        return attended.reshape(batch, -1, longest, self.head_dim)[rows, :, place]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary position embedding to ``[..., head_dim]``."""
    return x * cos + rotate_half(x) * sin

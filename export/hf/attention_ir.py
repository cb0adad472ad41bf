"""Routed attention. This file travels with the checkpoint, see modeling_ir.py."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv, rotate_half

from .routed_ir import RoutedUnit, Where

KERNELS = "sdpa", "eager", "paged|eager"
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


class RoutedAttention(RoutedUnit):
    """Mixed in before a family's attention."""

    skipped: tuple[str, ...] = ("q_proj", "o_proj")
    o_proj: nn.Linear
    layer_idx: Any
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: Any
    whole_norm = False  # whether queries and keys are normalised over all heads together
    softcap: float | None = None

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_routing(config, layer_idx, "attention")
        self.strict = config.kv_cache == "strict"
        if self.strict:
            self.skipped = ("q_proj", "k_proj", "v_proj", "o_proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Like the family's, but there are no attention weights where tokens are approximated.

        The cache is ``past_key_values``, or ``cache`` from version 5.24 of transformers on; in continuous batching that has
        always been a paged one's name.

        With a strict KV cache, an approximated token's keys and values are zero, and no token sees a key that is zero in
        every head: the cache itself says who is in it.
        """
        h = self.seen(hidden_states)
        where = self.executed(h)
        every = where is None
        cache = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        paged = cache is not None and not isinstance(cache, Cache)
        # A strict cache may hold gaps; transformers' own attention over a paged cache knows no soft cap.
        if every and (paged or (self.strict and cache is not None)):
            rows, columns = hidden_states.new_ones(hidden_states.shape[:2]).nonzero(as_tuple=True)
            where = rows, columns
        if where is None:
            output, weights = super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE: cache},
                **kwargs,
            )
            return self.finished(output), weights
        if self.config._attn_implementation not in KERNELS:
            raise ValueError(f"routed attention runs with 'sdpa' or 'eager', not '{self.config._attn_implementation}'")
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError(
                "output_attentions: approximated tokens have no attention weights; set_sparsity(0) has all"
                + (", with use_cache=False" if self.strict else "")
            )
        output = torch.empty_like(h) if every else self.forecast(h)
        keys = self._kept("k", hidden_states, where)
        values = self._kept("v", hidden_states, where)
        cos, sin = position_embeddings
        rotated = getattr(self, "use_rope", True)
        if rotated:
            keys = rotate(keys, cos.unsqueeze(1), sin.unsqueeze(1))
        if cache is not None:
            # Version 4 of transformers places the tokens in a static cache by these; with a paged one texts of all lengths are
            # in one row, and the arguments say where they lie.
            place = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            keys, values = cache.update(keys, values, self.layer_idx, kwargs if paged else place)
        if len(where[0]):
            queries = self._heads("q", hidden_states[where])
            if rotated:
                cos, sin = (angle.expand(len(hidden_states), -1, -1)[where].unsqueeze(1) for angle in (cos, sin))
                queries = rotate(queries, cos, sin)
            attended = self._attend(queries, keys, values, attention_mask, where, hidden_states.shape[1])
            output[where] = self.finished(self.project_out(attended.flatten(1))).to(output.dtype)  # under autocast
        return output, None

    def project(self, part: str, x: Tensor) -> Tensor:
        """Projects ``[..., hidden]`` to all heads of the queries, keys or values (``q``, ``k``, ``v``)."""
        return getattr(self, f"{part}_proj")(x)

    def project_out(self, attended: Tensor) -> Tensor:
        """Projects what all heads attended to, ``[executed, heads x head_dim]`` -> ``[executed, hidden]``."""
        return self.o_proj(attended)

    def _heads(self, part: str, x: Tensor) -> Tensor:
        """Projects ``[..., hidden]`` -> ``[..., heads, head_dim]``, normalised in the families that do."""
        projected, norm = self.project(part, x), getattr(self, f"{part}_norm", None)
        if norm is not None and self.whole_norm:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        return heads if norm is None or self.whole_norm else norm(heads)

    def _kept(self, part: str, x: Tensor, where: Where) -> Tensor:
        """Keys or values of the tokens that leave some ``[batch, kv_heads, sequence, head_dim]``, zero elsewhere."""
        if not self.strict:
            return self._heads(part, x).transpose(1, 2)
        heads = self._heads(part, x[where])
        kept = heads.new_zeros(*x.shape[:2], *heads.shape[1:])
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
        if self.softcap is None:
            attended = F.scaled_dot_product_attention(
                padded, keys, values, attn_mask=mask, dropout_p=dropout, scale=self.scaling
            )
        else:
            scores = self.softcap * torch.tanh(padded @ keys.transpose(2, 3) * (self.scaling / self.softcap))
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            elif mask is not None:
                scores = scores + mask
            weights = F.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
            attended = F.dropout(weights, dropout) @ values
        return attended.reshape(batch, -1, longest, self.head_dim)[rows, :, place]


class RoutedPackedAttention(RoutedAttention):
    """Mixed in before an attention that has queries, keys and values in one projection, in this order."""

    qkv_proj: nn.Linear

    def project(self, part: str, x: Tensor) -> Tensor:
        config = self.config
        q, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        start, stop = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part]
        if whole(self.qkv_proj):
            return self.qkv_proj(x)[..., start:stop]
        return F.linear(x, self.qkv_proj.weight[start:stop])


def whole(linear: nn.Module) -> bool:
    """Whether a projection has to run as a whole: adapters, quantized weights, offloading and hooks come in its call."""
    hooked = hasattr(linear, "_hf_hook") or linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is not nn.Linear or bool(hooked)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary position embedding to ``[..., head_dim]``, or to as much of its beginning as there are angles for."""
    turned = x[..., : cos.shape[-1]]
    turned = (turned * cos + rotate_half(turned) * sin).to(x.dtype)
    return turned if turned.shape == x.shape else torch.cat([turned, x[..., cos.shape[-1] :]], -1)

"""Informed routing for transformers models. This file travels with the checkpoint; it needs only torch and transformers.

Each unit (attention, MLP) of each layer sees the normalised hidden states h and decides for every token:

    unit(h) if score(h) > threshold else forecast(h)

Only executed tokens are computed: they are gathered, run through the unit, and put back into the forecast. Keys and
values are computed for every token, so that later tokens can attend to it; with ``config.kv_cache`` "strict", for executed
tokens only. A unit that is not routed is the base model's own. ``model.set_sparsity(0.3)`` moves the threshold; at 0 the
model is the dense one. Decisions are deterministic.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP

from .configuration_ir import IRLlamaConfig, IRMistralConfig, IRQwen2Config, IRQwen3Config
from .control_ir import GAIN, SparsityControl
from .routed_ir import Count, RoutedAttention, RoutedMLP, RoutedUnit, flops

# A layer's units, by the name of their module.
UNITS = {"self_attn": "attention", "mlp": "mlp"}


@dataclass
class RoutingStatistics:
    """What every routed unit did while observed; padding counts like any token.

    Attributes:
        counts: by (layer, ``attention`` or ``mlp``).
    """

    counts: dict[tuple[int, str], Count]
    _units: dict[tuple[int, str], RoutedUnit] = field(repr=False)
    _layers: Any = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return max((count.tokens for count in self.counts.values()), default=0)

    @property
    def decisions(self) -> float:
        """The share of decisions that approximated; units that are not routed always execute."""
        approximated = sum(count.tokens - count.executed for count in self.counts.values())
        return approximated / max(self.tokens * len(UNITS) * len(self._layers), 1)

    @property
    def sparsity(self) -> float:
        """The share of the layers' linear FLOPs saved, forecaster and router cost subtracted."""
        dense = sum(
            flops(layer.self_attn, *RoutedAttention.projections) + flops(layer.mlp, *RoutedMLP.projections)
            for layer in self._layers
        )
        saved = sum(
            (count.tokens - count.executed) * self._units[key].saved - count.routed * self._units[key].overhead
            for key, count in self.counts.items()
        )
        return saved / max(self.tokens * dense, 1)

    def clear(self) -> None:
        """Counts from zero again."""
        for count in self.counts.values():
            count.tokens = count.executed = count.routed = 0


class InformedRouting:
    """Mixed in before a family's causal language model."""

    attention: type[RoutedAttention]
    mlp: type[RoutedMLP]
    config: Any
    model: Any
    post_init: Any
    register_forward_hook: Any
    # Other attention kernels take no rows of a mask, and which tokens execute is data: nothing to compile whole.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.model.layers):
            if config.routing_shape(index, "attention"):
                layer.self_attn = self.attention(config, index)
            if config.routing_shape(index, "mlp"):
                layer.mlp = self.mlp(config, index)
        self._keep_in_fp32_modules_strict: Any = {"score"}
        self.post_init()

    def set_sparsity(self, sparsity: float) -> None:
        """Saves this share of the FLOPs from now on; 0 is the dense model. Kept by ``save_pretrained``.

        Raises:
            ValueError: negative, or more than the routing reaches.
        """
        self.config.set_sparsity(sparsity)

    @contextmanager
    def routing_statistics(self) -> Iterator[RoutingStatistics]:
        """Counts decisions inside a ``with`` block: ``with model.routing_statistics() as seen: ...; seen.sparsity``."""
        units = {
            (index, unit): getattr(layer, module)
            for index, layer in enumerate(self.model.layers)
            for module, unit in UNITS.items()
            if isinstance(getattr(layer, module), RoutedUnit)
        }
        statistics = RoutingStatistics({key: Count() for key in units}, units, self.model.layers)
        for key, unit in units.items():
            unit.counts.append(statistics.counts[key])
        try:
            yield statistics
        finally:
            for key, unit in units.items():
                unit.counts = [count for count in unit.counts if count is not statistics.counts[key]]

    @contextmanager
    def hold_sparsity(self, sparsity: float, gain: float = GAIN) -> Iterator[SparsityControl]:
        """Inside a ``with`` block, moves the threshold as text drifts, so that what is saved stays at ``sparsity``.

        Args:
            sparsity: the share of FLOPs to save.
            gain: how far the threshold moves for each unit of sparsity missed over 256 tokens.

        Raises:
            ValueError: negative, or more than the routing reaches.
        """
        before = self.config.sparsity, self.config.routing_threshold
        self.set_sparsity(sparsity)
        control = SparsityControl(sparsity, float(self.config.routing_threshold), gain)
        with self.routing_statistics() as seen:

            def move(*_: Any) -> None:
                threshold = control.observe(seen.sparsity, seen.tokens)
                self.config.routing_threshold = threshold if math.isfinite(threshold) else str(threshold)
                seen.clear()

            hook = self.register_forward_hook(move)
            try:
                yield control
            finally:
                hook.remove()
                self.config.sparsity, self.config.routing_threshold = before


class IRLlamaAttention(RoutedAttention, LlamaAttention): ...  # type: ignore[misc]


class IRLlamaMLP(RoutedMLP, LlamaMLP): ...


class IRLlamaForCausalLM(InformedRouting, LlamaForCausalLM):
    config_class = IRLlamaConfig
    attention, mlp = IRLlamaAttention, IRLlamaMLP


class IRMistralAttention(RoutedAttention, MistralAttention): ...


class IRMistralMLP(RoutedMLP, MistralMLP): ...


class IRMistralForCausalLM(InformedRouting, MistralForCausalLM):
    config_class = IRMistralConfig
    attention, mlp = IRMistralAttention, IRMistralMLP


class IRQwen2Attention(RoutedAttention, Qwen2Attention): ...


class IRQwen2MLP(RoutedMLP, Qwen2MLP): ...


class IRQwen2ForCausalLM(InformedRouting, Qwen2ForCausalLM):
    config_class = IRQwen2Config
    attention, mlp = IRQwen2Attention, IRQwen2MLP


class IRQwen3Attention(RoutedAttention, Qwen3Attention): ...


class IRQwen3MLP(RoutedMLP, Qwen3MLP): ...


class IRQwen3ForCausalLM(InformedRouting, Qwen3ForCausalLM):
    config_class = IRQwen3Config
    attention, mlp = IRQwen3Attention, IRQwen3MLP


for _model in (IRLlamaForCausalLM, IRMistralForCausalLM, IRQwen2ForCausalLM, IRQwen3ForCausalLM):
    _model.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained copies this file

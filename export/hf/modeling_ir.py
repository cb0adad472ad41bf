"""Informed routing for transformers models. This file travels with the checkpoint; it needs only torch and transformers.

Each unit (attention, MLP) of each layer sees the normalised hidden states h and decides for every token:

    unit(h) if score(h) > threshold else forecast(h)

Only executed tokens are computed: they are gathered, run through the unit, and put back into the forecast. Keys and
values are computed for every token, so that later tokens can attend to it. ``model.set_sparsity(0.3)`` moves the
threshold; at 0 the model is the dense one. Decisions are deterministic.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP

from .configuration_ir import IRLlamaConfig, IRMistralConfig, IRQwen2Config, IRQwen3Config
from .routed_ir import Count, RoutedAttention, RoutedMLP, RoutedUnit

# A layer's units, by the name of their module.
UNITS = {"self_attn": "attention", "mlp": "mlp"}


@dataclass
class RoutingStatistics:
    """What every unit did while observed; padding counts like any token.

    Attributes:
        counts: by (layer, ``attention`` or ``mlp``).
    """

    counts: dict[tuple[int, str], Count] = field(default_factory=dict)
    _units: dict[tuple[int, str], RoutedUnit] = field(default_factory=dict, repr=False)

    @property
    def decisions(self) -> float:
        """The share of decisions that approximated."""
        tokens = sum(count.tokens for count in self.counts.values())
        return sum(count.tokens - count.executed for count in self.counts.values()) / max(tokens, 1)

    @property
    def sparsity(self) -> float:
        """The share of the layers' linear FLOPs saved, forecaster and router cost subtracted."""
        saved = dense = 0
        for key, count in self.counts.items():
            unit = self._units[key]
            dense += count.tokens * unit.flops(*unit.projections)
            saved += (count.tokens - count.executed) * unit.flops(*unit.skipped)
            saved -= count.routed * unit.flops("forecaster.down", "forecaster.up", "router.hidden", "router.score")
        return saved / max(dense, 1)


class InformedRouting:
    """Mixed in before a family's causal language model."""

    attention: type[RoutedAttention]
    mlp: type[RoutedMLP]
    config: Any
    model: Any
    post_init: Any
    # Other attention kernels take no rows of a mask, and which tokens execute is data: nothing to compile whole.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = self.attention(config, index)
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
        }
        statistics = RoutingStatistics({key: Count() for key in units}, units)
        for key, unit in units.items():
            unit.count = statistics.counts[key]
        try:
            yield statistics
        finally:
            for unit in units.values():
                unit.count = None


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

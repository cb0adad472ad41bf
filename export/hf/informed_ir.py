"""A routed language model: its dial, and what it tells of its decisions. This file travels with the checkpoint, see modeling_ir.py."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .attention_ir import RoutedAttention
from .control_ir import GAIN, SparsityControl
from .routed_ir import Count, Padding, PostNorm, RoutedMLP, RoutedUnit, projection_flops

# A layer's units, by the name of their module.
UNITS = {"self_attn": "attention", "mlp": "mlp"}
# The norms after them, in families that have such.
POST_NORMS = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


@dataclass
class RoutingStatistics:
    """What every routed unit did with real tokens while observed.

    Padding is what a 2-D attention mask says it is: not with a static cache, for which transformers' ``generate`` makes another
    mask, nor what it feeds to texts that have ended.

    Attributes:
        counts: by (layer, ``attention`` or ``mlp``).
    """

    counts: dict[tuple[int, str], Count]
    _units: dict[tuple[int, str], RoutedUnit] = field(repr=False)
    _layers: Any = field(repr=False)
    _config: Any = field(repr=False)

    @property
    def tokens(self) -> int:
        """Real tokens that went through the model."""
        return max((count.tokens for count in self.counts.values()), default=0)

    @property
    def decisions(self) -> float:
        """The share of decisions that approximated; units that are not routed always execute."""
        approximated = sum(count.tokens - count.executed for count in self.counts.values())
        return approximated / max(self.tokens * len(UNITS) * len(self._layers), 1)

    @property
    def sparsity(self) -> float:
        """The share of the layers' linear FLOPs saved, forecaster and router cost subtracted."""
        dense = len(self._layers) * sum(projection_flops(self._config).values())
        saved = sum(
            (count.tokens - count.executed) * self._units[key].saved - count.routed * self._units[key].overhead
            for key, count in self.counts.items()
        )
        return saved / max(self.tokens * dense, 1)

    def clear(self) -> None:
        """Counts from zero again."""
        for count in self.counts.values():
            count.tokens = count.executed = count.routed = 0


@dataclass(eq=False)
class Held:
    """One that holds a sparsity, and where the dial was before it: sparsity and threshold."""

    control: SparsityControl
    before: tuple[Any, Any]


def hand_norms_over(layer: Any, _: Any) -> None:
    """A hook before a layer's forward: its units apply the norms after them, or what an adapter has put in their place."""
    for module, unit in UNITS.items():
        place = getattr(layer, module)
        for routed in [place] if isinstance(place, RoutedUnit) else place.modules():
            if isinstance(routed, RoutedUnit):
                routed.take_post_norm(getattr(layer, POST_NORMS[unit]))


class InformedRouting:
    """Mixed in before a family's causal language model."""

    attention: type[RoutedAttention]
    mlp: type[RoutedMLP]
    post_norm: type[PostNorm] | None = None
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
            if self.post_norm is not None:
                layer.register_forward_pre_hook(hand_norms_over)
            for module, unit in UNITS.items():
                if config.routing_shape(index, unit):
                    routed = (self.attention if unit == "attention" else self.mlp)(config, index)
                    setattr(layer, module, routed)
                    if self.post_norm is not None:
                        norm = self.post_norm(config.hidden_size, eps=config.rms_norm_eps)
                        setattr(layer, POST_NORMS[unit], norm)
        self._held: list[Held] = []  # the last one is in charge
        self._keep_in_fp32_modules_strict: Any = {"score"}
        self._keep_in_fp32_modules: Any = {"score"}  # whoever quantizes leaves out these
        self.post_init()

    def set_sparsity(self, sparsity: float) -> None:
        """Saves this share of the FLOPs from now on; 0 is the dense model. Kept by ``save_pretrained``.

        Raises:
            ValueError: negative, or more than the routing reaches.
        """
        self.config.set_sparsity(sparsity)

    @contextmanager
    def routing_statistics(self) -> Iterator[RoutingStatistics]:
        """Counts decisions inside a ``with`` block: ``with model.routing_statistics() as seen: ...; seen.sparsity``.

        All calls of the model count, from whichever thread.
        """
        units = {
            (index, unit): getattr(layer, module)
            for index, layer in enumerate(self.model.layers)
            for module, unit in UNITS.items()
            if isinstance(getattr(layer, module), RoutedUnit)
        }
        padding = Padding()
        counts = {key: Count(padding=padding) for key in units}
        statistics = RoutingStatistics(counts, units, self.model.layers, self.config)
        hook = self.model.register_forward_pre_hook(padding.look, with_kwargs=True)
        for key, unit in units.items():
            unit.counts.append(statistics.counts[key])
        try:
            yield statistics
        finally:
            hook.remove()
            for key, unit in units.items():
                unit.counts = [count for count in unit.counts if count is not statistics.counts[key]]

    @contextmanager
    def hold_sparsity(self, sparsity: float, gain: float = GAIN) -> Iterator[SparsityControl]:
        """Inside a ``with`` block, moves the threshold as text drifts, so that what is saved stays at ``sparsity``.

        Before each call it is put where the calls before have led it, by a step every 256 tokens. ``set_sparsity`` inside gives
        it another aim; of several blocks the one that began last is in charge, for the model has one dial in all its threads.

        Args:
            sparsity: the share of FLOPs to save.
            gain: how far the threshold moves for each unit of sparsity missed over 256 tokens.

        Raises:
            ValueError: negative, or more than the routing reaches; a gain that is not positive.
        """
        control = SparsityControl(sparsity, 0.0, gain)
        held = Held(control, (self.config.sparsity, self.config.routing_threshold))
        self.set_sparsity(sparsity)
        control.start(sparsity, float(self.config.routing_threshold))
        placed = self.config.routing_threshold  # where the control, and nobody else, has put it
        with self.routing_statistics() as seen:

            def begin(*_: Any) -> None:
                # Not after a call: what gradient checkpointing computes again needs the threshold of the first time.
                nonlocal placed
                seen.clear()  # of calls that failed, of what was computed again, and of those that another control led
                if self._held[-1] is held:
                    if self.config.routing_threshold != placed:  # the dial was moved
                        control.start(self.config.sparsity, float(self.config.routing_threshold))
                    placed = control.threshold if math.isfinite(control.threshold) else str(control.threshold)
                    self.config.routing_threshold = placed

            def end(*_: Any) -> None:
                if self._held[-1] is held:
                    control.observe(seen.sparsity, seen.tokens)

            # At the decoder: wrappers such as adapters may pass the outer module's hooks by.
            hooks = [self.model.register_forward_pre_hook(begin), self.model.register_forward_hook(end)]
            self._held.append(held)
            try:
                yield control
            finally:
                for hook in hooks:
                    hook.remove()
                place = self._held.index(held)
                if held is self._held[-1]:
                    self.config.sparsity, self.config.routing_threshold = held.before
                else:  # one that began later, in another thread, will put the dial back
                    self._held[place + 1].before = held.before
                del self._held[place]

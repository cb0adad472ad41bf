"""The whole routed model, differentiable: transformers' own forward pass, its units replaced by routed ones.

Everything is computed densely and masked: training needs both the unit's output and the forecast where a gate has a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...checkpoint import Checkpoint
from ...decoder import additive, attention_kernel, causal_mask, load_layer, skeleton
from ...families import UNITS, family_of, sliding_windows
from ...flops import Key
from ...units import Forecaster, RoutedUnit, Router, Units, rms_normalised
from .gates import Gates


class Routing(nn.Module):
    """One unit's forecaster and router as trainable fp32 parameters."""

    def __init__(self, unit: RoutedUnit, device: torch.device) -> None:
        super().__init__()

        def parameters(part: Forecaster | Router) -> nn.ParameterDict:
            # Copies: training must not write into the caller's tensors.
            copies = {name: tensor.detach().to(device, torch.float32, copy=True) for name, tensor in vars(part).items()}
            return nn.ParameterDict({name: nn.Parameter(copy) for name, copy in copies.items()})

        self.forecaster, self.router = parameters(unit.forecaster), parameters(unit.router)

    def unit(self) -> RoutedUnit:
        """Returns the parameters themselves as a routed unit."""
        return RoutedUnit(Forecaster(**dict(self.forecaster.items())), Router(**dict(self.router.items())))


Observer = Callable[[RoutedUnit, Tensor, Tensor], None]


@dataclass
class _Pass:
    """What the units of one model share during a forward pass."""

    gates: Gates = field(default_factory=lambda: Gates("dense"))
    noise: Mapping[Key, Tensor] = field(default_factory=dict)
    taken: dict[Key, Tensor] | None = None
    observer: Observer | None = None


class _RoutedModule(nn.Module):
    """Puts itself in a decoder layer where the unit's own module stood, and routes it.

    The unit's post norm is taken into it, for a forecast is added to the stream as it is; the layer's residual multiplier,
    which still follows, is divided out of forecasts.
    """

    def __init__(self, key: Key, layer: nn.Module, config: PretrainedConfig, routing: Routing, now: _Pass) -> None:
        super().__init__()
        family = family_of(config)
        places = family.unit(key[1])
        self._key, self.routing, self._now = key, routing, now
        self.inner = getattr(layer, places.module)
        self._multiplier = family.residual_multiplier(config)
        self._bare_eps = config.rms_norm_eps if places.norm is None else None
        self._post_norm: nn.Module | None = None
        if places.post_norm is not None:
            self._post_norm = getattr(layer, places.post_norm)
            setattr(layer, places.post_norm, nn.Identity())
        setattr(layer, places.module, self)

    def _route(self, seen: Tensor, run: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Returns the routed output for what the unit sees ``[batch, sequence, hidden]``; ``run`` takes the gates and runs it."""
        now, gates = self._now, self._now.gates
        h = seen if self._bare_eps is None else rms_normalised(seen, self._bare_eps)

        def finished(gate: Tensor | None) -> Tensor:
            output = run(gate)
            return output if self._post_norm is None else self._post_norm(output)

        if now.observer is not None:
            output = finished(None)
            with torch.enable_grad():
                now.observer(self.routing.unit(), h.detach().float(), output.detach().float() * self._multiplier)
            return output
        if gates.rule == "dense":
            return finished(None)
        routed, source = self.routing.unit(), h.float()
        score = routed.router(source if gates.into_stream else source.detach())
        gate = gates.decide(score, now.noise.get(self._key))
        # None while gradient checkpointing runs a layer again: the gates are known by then.
        if now.taken is not None:
            now.taken[self._key] = gate
        execute = gate.unsqueeze(-1).to(h.dtype)
        forecast = (routed.forecaster(source) / self._multiplier).to(h.dtype)
        return execute * finished(gate) + (1 - execute) * forecast


class _RoutedMLP(_RoutedModule):
    def forward(self, hidden_states: Tensor) -> Tensor:
        def run(_: Tensor | None) -> Tensor:
            output = self.inner(hidden_states)
            return output[0] if isinstance(output, tuple) else output  # see Layer

        return self._route(hidden_states, run)


class _RoutedAttention(_RoutedModule):
    def __init__(
        self, key: Key, layer: nn.Module, config: PretrainedConfig, routing: Routing, now: _Pass, strict: bool
    ) -> None:
        super().__init__(key, layer, config, routing, now)
        self._strict, self._window = strict, sliding_windows(config)[key[0]]
        self._eager = attention_kernel(config) == "eager"
        for name in ("is_sliding", "attention_type"):  # Gemma 3's layers and OLMo 3's model ask in transformers 4
            setattr(self, name, getattr(self.inner, name, None))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        def run(gate: Tensor | None) -> Tensor:
            strict = self._strict and gate is not None
            mask = attention_mask
            if strict and gate is not None:
                visible = gate.detach() > 0
                mask = causal_mask(visible.shape[1], self._window, visible, visible.device)
                mask = additive(mask, hidden_states.dtype) if self._eager else mask
            return self.inner(hidden_states=hidden_states, attention_mask=mask, **others)[0]

        return self._route(hidden_states, run), None


class Output(NamedTuple):
    """Attributes: fp32 logits ``[batch, sequence, vocabulary]``; gates ``[batch, sequence]`` by (layer, unit)."""

    logits: Tensor
    gates: dict[Key, Tensor]


class RoutedModel(nn.Module):
    """The base model, frozen, with trainable forecasters and routers.

    Args:
        checkpoint: the base model; its LoRA changes are folded in.
        units: where forecasters and routers start, by (layer, unit); copied. Units that are missing always execute.
        kv_cache: ``full``, or ``strict``: approximated tokens leave no keys and values, but see themselves.
        dtype: of the base model; forecasters and routers are fp32.
        device: where to compute.
        gradient_checkpointing: keeps only layer boundaries for the backward pass, and computes the rest again.
        adapt: is given each (layer index, decoder layer) when it is loaded, to add trainable parameters of its own.
        shard: is given each decoder layer, then the whole model, when loaded: a layer at a time is whole in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Units,
        *,
        kv_cache: str = "full",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        adapt: Callable[[int, nn.Module], None] | None = None,
        shard: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self._now, self._routings = _Pass(), {key: Routing(units[key], self.device) for key in sorted(units)}
        base = skeleton(checkpoint.config, self.device)
        for index, layer in enumerate(base.model.layers):
            load_layer(layer, checkpoint, index, dtype, self.device)
            for unit in UNITS:
                if (routing := self._routings.get((index, unit))) is not None:
                    place = ((index, unit), layer, checkpoint.config, routing, self._now)
                    if unit == "attention":
                        _RoutedAttention(*place, strict=kv_cache == "strict")
                    else:
                        _RoutedMLP(*place)
            if adapt:
                adapt(index, layer)
            if shard:
                shard(layer)
        _load_ends(base, checkpoint, dtype, self.device)
        if gradient_checkpointing:
            # transformers 5's name of it, and 4's.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            # Checkpointing asks for training mode; the units stay in evaluation mode, so nothing drops out.
            for layer in base.model.layers:
                layer.training = True
        if shard:
            shard(base)
        self.base = base
        # A stage switches on what it trains.
        self.requires_grad_(False)

    def forward(self, ids: Tensor, gates: Gates, noise: Mapping[Key, Tensor] | None = None) -> Output:
        """Runs token blocks ``ids[batch, sequence]`` without padding.

        Args:
            gates: how to decide.
            noise: logistic noise ``[batch, sequence]`` by (layer, unit), for the ``gumbel`` rule.
        """
        now = self._now
        now.gates, now.noise, now.taken = gates, noise or {}, {}
        try:
            logits = self.base(input_ids=ids, use_cache=False).logits.float()
            return Output(logits, now.taken)
        finally:
            now.taken = None

    def observe(self, ids: Tensor, observer: Observer) -> None:
        """Runs the dense model without gradients, and shows ``observer(unit, h, y)`` every routed unit's input and output.

        Both are fp32 ``[batch, sequence, hidden]``; gradients are enabled inside, so the observer can call ``backward``.
        """
        self._now.observer = observer
        try:
            with torch.no_grad():
                self.base(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            self._now.observer = None

    def trainable(self, part: str) -> list[nn.Parameter]:
        """Returns the parameters of all ``forecaster`` or all ``router`` parts, in the order of the units."""
        return [parameter for routing in self._routings.values() for parameter in getattr(routing, part).parameters()]

    @torch.no_grad()
    def to_units(self) -> Units:
        """Returns copies of forecasters and routers, fp32 on the CPU."""
        return {
            key: RoutedUnit.from_tensors(
                {
                    name: tensor.detach().to("cpu", copy=True).contiguous()
                    for name, tensor in routing.unit().tensors().items()
                }
            )
            for key, routing in self._routings.items()
        }


def _load_ends(base: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Loads embedding, final norm and head; one tensor stays one."""
    family = checkpoint.family
    places = {base.model.embed_tokens: family.embedding, base.model.norm: family.final_norm}
    if not checkpoint.tied:
        places[base.lm_head] = family.head
    for module, name in places.items():
        _assign(module, {"weight": checkpoint.read(name, dtype).to(device)})
    if checkpoint.tied:
        base.lm_head.weight = base.model.embed_tokens.weight


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)

"""The whole routed model, differentiable: transformers' own forward pass, its units replaced by routed ones.

Everything is computed densely and masked: training needs both the unit's output and the forecast where a gate has a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...checkpoint import Checkpoint
from ...decoder import causal_mask
from ...families import UNITS, sliding_windows
from ...flops import Key
from ...units import Forecaster, RoutedUnit, Router, Units
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
    """Stands in a decoder layer where the unit's own module stood, and routes it."""

    def __init__(self, key: Key, inner: nn.Module, routing: Routing, now: _Pass) -> None:
        super().__init__()
        self._key, self.inner, self.routing, self._now = key, inner, routing, now

    def _route(self, h: Tensor, run: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Returns the routed output for ``h[batch, sequence, hidden]``; ``run`` takes the gates and runs the unit."""
        now, gates = self._now, self._now.gates
        if now.observer is not None:
            output = run(None)
            with torch.enable_grad():
                now.observer(self.routing.unit(), h.detach().float(), output.detach().float())
            return output
        if gates.rule == "dense":
            return run(None)
        routed, source = self.routing.unit(), h.float()
        score = routed.router(source if gates.into_stream else source.detach())
        gate = gates.decide(score, now.noise.get(self._key))
        # None while gradient checkpointing runs a layer again: the gates are known by then.
        if now.taken is not None:
            now.taken[self._key] = gate
        execute = gate.unsqueeze(-1).to(h.dtype)
        return execute * run(gate) + (1 - execute) * routed.forecaster(source).to(h.dtype)


class _RoutedMLP(_RoutedModule):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._route(hidden_states, lambda _: self.inner(hidden_states))


class _RoutedAttention(_RoutedModule):
    def __init__(
        self, key: Key, inner: nn.Module, routing: Routing, now: _Pass, strict: bool, window: int | None
    ) -> None:
        super().__init__(key, inner, routing, now)
        self._strict, self._window = strict, window

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        def run(gate: Tensor | None) -> Tensor:
            strict = self._strict and gate is not None
            mask = attention_mask
            if strict and gate is not None:
                visible = gate.detach() > 0
                mask = causal_mask(visible.shape[1], self._window, visible, visible.device)
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
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="sdpa").eval()
        base.requires_grad_(False)
        base.model.rotary_emb = type(base.model.rotary_emb)(config=checkpoint.config).to(self.device)
        windows = sliding_windows(checkpoint.config)
        for index, layer in enumerate(base.model.layers):
            tensors = checkpoint.read_layer(index, dtype)
            _assign(layer, {name: tensor.to(self.device) for name, tensor in tensors.items()})
            for unit in UNITS:
                if (routing := self._routings.get((index, unit))) is not None:
                    name = checkpoint.family.unit(unit).module
                    place = ((index, unit), getattr(layer, name), routing, self._now)
                    attention = unit == "attention"
                    strict = kv_cache == "strict"
                    setattr(
                        layer,
                        name,
                        _RoutedAttention(*place, strict, windows[index]) if attention else _RoutedMLP(*place),
                    )
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

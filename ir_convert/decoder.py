"""The base model in PyTorch, one decoder layer in memory at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from .checkpoint import Checkpoint
from .errors import UserError
from .experts import fit_experts
from .families import Family, family_of, sliding_windows
from .rope import rebuilt, rotary_embedding
from .units import rms_normalised

LOGITS = 1 << 24  # numbers: so many logits are in memory together

# Positions ``[1, sequence]`` and hidden states, whose dtype it takes, to cosines and sines ``[1, sequence, rotated]``.
Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Layer:
    """One decoder layer, opened up so that each unit can be run by itself on full blocks of tokens."""

    def __init__(self, module: nn.Module, config: PretrainedConfig, rotary: Rotary, window: int | None) -> None:
        self._module, self._config, self._rotary, self._window = module, config, rotary, window
        self._family = family_of(config)
        self._multiplier = self._family.residual_multiplier(config)
        self._eager = attention_kernel(config) == "eager"

    def norm(self, unit: str, x: Tensor) -> Tensor:
        """Returns h, what the unit's router and forecaster see of the stream x; both ``[batch, sequence, hidden]``."""
        name = self._family.unit(unit).norm
        return rms_normalised(x, self._config.rms_norm_eps) if name is None else getattr(self._module, name)(x)

    def contribution(self, unit: str, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns what the unit adds to the stream x, its norms included; both ``[batch, sequence, hidden]``.

        Args:
            visible: bool ``[batch, sequence]``: the tokens that leave keys and values (strict KV cache); all by default.
                Every token sees itself.
        """
        places = self._family.unit(unit)
        seen = x if places.norm is None else self.norm(unit, x)
        output = self._run(getattr(self._module, places.module), seen, unit, visible)
        if places.post_norm is not None:
            output = getattr(self._module, places.post_norm)(output)
        return output if self._multiplier == 1 else output * self._multiplier

    def _run(self, module: nn.Module, seen: Tensor, unit: str, visible: Tensor | None) -> Tensor:
        if unit == "mlp":
            output = module(seen)
            return output[0] if isinstance(output, tuple) else output  # experts' scores come along in transformers 4
        positions = torch.arange(seen.shape[1], device=seen.device).unsqueeze(0)
        output, _ = module(
            hidden_states=seen,
            position_embeddings=self._rotary(seen, positions),
            attention_mask=self._mask(seen, visible),
        )
        return output

    def _mask(self, h: Tensor, visible: Tensor | None) -> Tensor | None:
        """The mask ``[batch or 1, 1, query, key]``; None (plain causal) where every token sees all before it."""
        length = h.shape[1]
        window = length if self._window is None else self._window
        if window >= length and visible is None and not self._eager:
            return None
        mask = causal_mask(length, window, visible, h.device)
        return additive(mask, h.dtype) if self._eager else mask


def causal_mask(length: int, window: int | None, visible: Tensor | None, device: torch.device) -> Tensor:
    """Returns who sees whom, bool ``[batch or 1, 1, query, key]``.

    Args:
        length: of the sequences.
        window: how many positions back a token sees, itself included; None for all.
        visible: bool ``[batch, sequence]``: the tokens that leave keys and values; None for all. Every token sees itself.
    """
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    causal = everything.tril() if window is None else everything.tril() & everything.triu(1 - window)
    if visible is None:
        return causal[None, None]
    return causal & (visible[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a bool mask as what ``eager`` attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def attention_kernel(config: PretrainedConfig) -> str:
    """Returns which of transformers' attentions computes this model: ``sdpa`` has no soft cap, and drops it in silence."""
    return "sdpa" if family_of(config).attention_softcap(config) is None else "eager"


def skeleton(config: PretrainedConfig, device: torch.device) -> Any:
    """Returns the model without weights: parameters on meta, what it computes from its configuration on ``device``."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention_kernel(config)).eval()
    inner = model.model
    for name, module in list(inner.named_children()):
        if "rotary" in name:
            setattr(inner, name, rebuilt(module).to(device))
    if hasattr(inner.embed_tokens, "embed_scale"):
        inner.embed_tokens.embed_scale = torch.tensor(family_of(config).embedding_scale(config), device=device)
    return model.requires_grad_(False)


class Decoder:
    """The base model's parts. Weights are read when a part is asked for, in ``dtype``, and not kept.

    Args:
        checkpoint: where the weights are.
        device: where to compute.
        dtype: precision of weights and arithmetic.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.config = checkpoint.config
        self._skeleton = skeleton(self.config, device)
        self._windows = sliding_windows(self.config)
        self._loaded: int | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Embeds tokens ``[batch, sequence]`` -> ``[batch, sequence, hidden]``, on the CPU."""
        family = self.checkpoint.family
        x = F.embedding(ids, self.checkpoint.read(family.embedding)).to(self.dtype)
        scale = family.embedding_scale(self.config)
        # Rounded first, as transformers does.
        return x if scale == 1 else x * torch.tensor(scale, dtype=self.dtype)

    def layers(self) -> Iterator[tuple[int, Layer]]:
        """Yields (index, layer) from first to last, one loaded at a time."""
        for index in range(self.config.num_hidden_layers):
            yield index, self.layer(index)

    def layer(self, index: int) -> Layer:
        module = self._skeleton.model.layers[index]
        # assign=True replaces the meta parameters of a throw-away skeleton; the previous layer's go back to meta.
        self._release()
        load_layer(module, self.checkpoint, index, self.dtype, self.device)
        self._loaded = index
        return Layer(module, self.config, self._rotary(index), self._windows[index])

    def for_logits(self, tokens: int) -> Iterator[slice]:
        """Yields slices of ``tokens`` tokens whose logits may be in memory together."""
        step = max(1, LOGITS // self.config.vocab_size)
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def head(self) -> "Head":
        """Loads the final norm and the language-model head."""
        self._release()
        family = self.checkpoint.family
        weight = self.checkpoint.read(family.final_norm, self.dtype).to(self.device)
        norm = self._skeleton.model.norm
        norm.load_state_dict({"weight": weight}, assign=True)
        weight = self.checkpoint.read(family.head, self.dtype).to(self.device)
        return Head(norm.requires_grad_(False), weight, family, self.config)

    def _rotary(self, index: int) -> Rotary:
        """Returns the position embedding of a layer; in some families local and global layers have different ones."""
        module, kind = rotary_embedding(self._skeleton.model, self.config, index)
        return module if kind is None else lambda x, positions: module(x, positions, kind)

    def _release(self) -> None:
        if self._loaded is not None:
            self._skeleton.model.layers[self._loaded].to("meta")
            self._loaded = None


def load_layer(module: nn.Module, checkpoint: Checkpoint, index: int, dtype: torch.dtype, device: torch.device) -> None:
    """Puts a layer's weights into its module, whose parameters may be on meta."""
    tensors, mlp = checkpoint.read_layer(index, dtype), checkpoint.family.mlp
    if mlp.experts is not None:
        tensors = fit_experts(tensors, module, f"{mlp.module}.{mlp.experts}")
    try:
        module.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:  # its first line names the class
        what = " ".join(str(error).split("\n", 1)[-1].split())
        raise UserError(f"layer {index} of {checkpoint.name} is not as config.json says: {what}") from error
    module.requires_grad_(False)


class Head:
    """Final norm and language-model head."""

    def __init__(self, norm: nn.Module, weight: Tensor, family: Family, config: PretrainedConfig) -> None:
        self._norm, self._weight = norm, weight
        self._divisor, self._softcap = family.logit_divisor(config), family.logit_softcap(config)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns fp32 logits ``[..., vocabulary]`` of the last layer's output ``[..., hidden]``."""
        logits = F.linear(self._norm(x), self._weight)
        if self._divisor != 1:
            logits = logits / self._divisor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()

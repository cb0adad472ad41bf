"""The base model in PyTorch, one decoder layer in memory at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from .checkpoint import Checkpoint
from .families import Family, sliding_windows


class Layer:
    """One decoder layer, opened up so that each unit can be run by itself on full blocks of tokens."""

    def __init__(self, module: nn.Module, family: Family, rope: nn.Module, window: int | None) -> None:
        self._module, self._family, self._rope, self._window = module, family, rope, window

    def norm(self, unit: str, x: Tensor) -> Tensor:
        """Returns what the unit sees, ``norm(x)``; both ``[batch, sequence, hidden]``."""
        return getattr(self._module, self._family.unit(unit).norm)(x)

    def run(self, unit: str, h: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns the unit's output for normalised hidden states; both ``[batch, sequence, hidden]``.

        Args:
            visible: bool ``[batch, sequence]``: the tokens that leave keys and values (strict KV cache); all by default.
                Every token sees itself.
        """
        module = getattr(self._module, self._family.unit(unit).module)
        if unit == "mlp":
            return module(h)
        positions = torch.arange(h.shape[1], device=h.device).unsqueeze(0)
        output, _ = module(
            hidden_states=h, position_embeddings=self._rope(h, positions), attention_mask=self._mask(h, visible)
        )
        return output

    def _mask(self, h: Tensor, visible: Tensor | None) -> Tensor | None:
        """The mask ``[batch or 1, 1, query, key]``; None (plain causal) where every token sees all before it."""
        length = h.shape[1]
        window = length if self._window is None else self._window
        if window >= length and visible is None:
            return None
        return causal_mask(length, window, visible, h.device)


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
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa").eval()
        inner = self._skeleton.model
        self._rope = type(inner.rotary_emb)(config=self.config).to(device)
        self._windows = sliding_windows(self.config)
        self._loaded: int | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Embeds tokens ``[batch, sequence]`` -> ``[batch, sequence, hidden]``, on the CPU."""
        table = self.checkpoint.read(self.checkpoint.family.embedding)
        return F.embedding(ids, table).to(self.dtype)

    def layers(self) -> Iterator[tuple[int, Layer]]:
        """Yields (index, layer) from first to last, one loaded at a time."""
        for index in range(self.config.num_hidden_layers):
            yield index, self.layer(index)

    def layer(self, index: int) -> Layer:
        module = self._skeleton.model.layers[index]
        # assign=True replaces the meta parameters of a throw-away skeleton; the previous layer's go back to meta.
        self._release()
        module.load_state_dict(
            {name: tensor.to(self.device) for name, tensor in self.checkpoint.read_layer(index, self.dtype).items()},
            assign=True,
        )
        module.requires_grad_(False)
        self._loaded = index
        return Layer(module, self.checkpoint.family, self._rope, self._windows[index])

    def head(self) -> "Head":
        """Loads the final norm and the language-model head."""
        self._release()
        family = self.checkpoint.family
        weight = self.checkpoint.read(family.final_norm, self.dtype).to(self.device)
        norm = self._skeleton.model.norm
        norm.load_state_dict({"weight": weight}, assign=True)
        return Head(norm.requires_grad_(False), self.checkpoint.read(family.head, self.dtype).to(self.device))

    def _release(self) -> None:
        if self._loaded is not None:
            self._skeleton.model.layers[self._loaded].to("meta")
            self._loaded = None


class Head:
    """Final norm and language-model head."""

    def __init__(self, norm: nn.Module, weight: Tensor) -> None:
        self._norm, self._weight = norm, weight

    def __call__(self, x: Tensor) -> Tensor:
        """Returns fp32 logits ``[..., vocabulary]`` of the last layer's output ``[..., hidden]``."""
        return F.linear(self._norm(x), self._weight).float()

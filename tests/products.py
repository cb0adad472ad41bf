"""Counts the work that really runs: FLOPs of every product with a weight matrix, whichever module it belongs to."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class Products(TorchFunctionMode):
    """Attributes:
    flops: by the unit that runs, as ``watch`` names them; under None what runs outside them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Any] = Counter()
        self.now: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            self.flops[self.now] += 2 * x.shape[:-1].numel() * weight.numel()
        return func(*args, **(kwargs or {}))


@contextmanager
def watch(model: PreTrainedModel, units: dict[Any, nn.Module]) -> Iterator[Products]:
    """Counts inside a ``with`` block, for each of these modules of the model by itself."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others multiply by all experts in one call of another function
    products, hooks = Products(), []
    for key, module in units.items():

        def enter(*_: Any, key: Any = key) -> None:
            products.now = key

        def leave(*_: Any) -> None:
            products.now = None

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with products, torch.no_grad():
        yield products
    for hook in hooks:
        hook.remove()

"""What models whose MLPs are mixtures of experts have beside. This file travels with the checkpoint, see modeling_ir.py."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import __version__

from .informed_ir import InformedRouting


class InformedMixture(InformedRouting):
    """Mixed in before a family's causal language model.

    Attributes:
        since: the oldest major version of transformers that will do: some layers of version 4 want the experts' scores back.
    """

    since = 4

    def __init__(self, config: Any) -> None:
        if int(__version__.split(".")[0]) < self.since:
            raise ValueError(f"{config.model_type} needs transformers {self.since} or newer, and this is {__version__}")
        require_no_scores(config.output_router_logits)
        super().__init__(config)


def require_no_scores(asked: bool) -> None:
    """Raises ValueError where the experts' scores are asked for: approximated tokens have none."""
    if asked:
        raise ValueError("output_router_logits is not supported: approximated tokens have no scores of experts")


def without_scores(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a family's forward that refuses to give the experts' scores."""

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_router_logits")
        require_no_scores(self.config.output_router_logits if asked is None else asked)
        return forward(self, *args, **kwargs)

    return checked


def put_together(family: str) -> None:
    """Says how a routed family's experts lie in files: version 5 of transformers has all in one tensor, and asks by model type.

    All are written as Qwen3-MoE's are.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    mapping = get_checkpoint_conversion_mapping("qwen3_moe")
    register_checkpoint_conversion_mapping(f"ir_{family}", mapping, overwrite=True)

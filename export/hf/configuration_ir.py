"""Configurations of informed-routing checkpoints. This file travels with the checkpoint; it needs only transformers.

A model type of our own makes transformers ask for ``trust_remote_code`` instead of silently loading the dense model.
"""

from typing import Any

import numpy as np
from transformers import (
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

# Transformers tells modeling code apart by the source of *this* file: it has to change whenever the others do.
MODELING_SHA256 = "cdeac76ce8d0"


class InformedRouting:
    """What routing adds to a family's configuration.

    Attributes:
        forecaster_rank: rank of the forecasters: one number, or ``{"attention": [per layer], "mlp": [per layer]}``, with
            None for a unit that is not routed.
        router_width: hidden width of the routers, in the same form.
        kv_cache: ``full``, keys and values are kept for every token, or ``strict``, for executed tokens only.
        sparsity: the share of FLOPs to save that was asked for.
        routing_threshold: a token executes where its score lies above. ``"-inf"`` executes all, ``"inf"`` none
            (strings, for JSON has no infinity).
        sparsity_curve: ``{"sparsity": [...], "threshold": [...]}``, measured; both rise.
        ir_convert_version: the version of the tool that wrote the checkpoint.
    """

    # No __init__: either line of transformers keeps the keywords it does not know as attributes.
    forecaster_rank: int | dict[str, list[int | None]] = 1
    router_width: int | dict[str, list[int | None]] = 1
    kv_cache: str = "full"
    sparsity: float = 0.0
    routing_threshold: float | str = "-inf"
    sparsity_curve: dict[str, list[float]] | None = None
    ir_convert_version: str | None = None

    def routing_shape(self, layer: int, unit: str) -> tuple[int, int] | None:
        """Returns rank and router width of one unit, ``attention`` or ``mlp``; None where it is not routed."""
        rank, width = (
            size if isinstance(size, int) else size[unit][layer] for size in (self.forecaster_rank, self.router_width)
        )
        return None if rank is None or width is None else (rank, width)

    def set_sparsity(self, sparsity: float) -> None:
        """Sets ``routing_threshold`` to save this share of the FLOPs; see the model's method of that name."""
        curve = self.sparsity_curve or {"sparsity": [0.0], "threshold": [0.0]}
        reachable = curve["sparsity"][-1]
        if not 0 <= sparsity <= reachable + 1e-9:
            raise ValueError(f"sparsity {sparsity:g} is out of reach: this model takes 0 (dense) to {reachable:.3f}")
        if sparsity == 0:
            self.routing_threshold = "-inf"
        else:
            self.routing_threshold = float(np.float32(np.interp(sparsity, curve["sparsity"], curve["threshold"])))
        self.sparsity = float(sparsity)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like the family's; ``sparsity=0.2``, also given to ``from_pretrained``, is ``set_sparsity(0.2)``."""
        sparsity = None if "routing_threshold" in kwargs else kwargs.pop("sparsity", None)
        result = super().from_dict(_experts_as_read_here(_rope_as_read_here(config_dict)), **kwargs)  # type: ignore[misc]
        if sparsity is not None:
            (result[0] if isinstance(result, tuple) else result).set_sparsity(sparsity)
        return result


def rope_of_version_4(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns transformers 5's ``rope_parameters`` in the spelling of transformers 4."""
    if "full_attention" in parameters:  # Gemma 3 and OLMo 3: local layers have a base of their own, and no scaling
        local = parameters["sliding_attention"]["rope_theta"]
        return rope_of_version_4(parameters["full_attention"]) | {"rope_local_base_freq": local}
    beside: dict[str, Any] = {
        name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters
    }
    scaling = {name: value for name, value in parameters.items() if name not in beside}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return beside
    if kind == "longrope":  # Phi 3 alone, and it takes just these
        scaling = {"type": kind} | {name: scaling[name] for name in ("short_factor", "long_factor")}
    return beside | {"rope_scaling": scaling}


def require_one_base(model_type: str, parameters: dict[str, Any]) -> None:
    """Raises ValueError where transformers 4 cannot hold these ``rope_parameters``: its OLMo 3 scales global layers alone."""
    if not model_type.endswith("olmo3") or "sliding_attention" not in parameters:
        return
    local, base = parameters["sliding_attention"], parameters["full_attention"].get("rope_theta")
    if local.get("rope_theta") != base or local.get("rope_type", "default") != "default":
        raise ValueError(
            f"sliding layers rotate by {local}: transformers 4 has the base of all other layers, {base}, and no scaling there: "
            "use transformers 5"
        )


def _rope_as_read_here(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with RoPE in one spelling, that of the running transformers."""
    parameters, model_type = values.get("rope_parameters"), values.get("model_type", "")
    if not parameters and model_type.endswith("olmo3") and "rope_theta" in values:
        # Version 5 would give the base that version 4 saved to global layers alone.
        base = {"rope_theta": values["rope_theta"], "rope_type": "default"}
        parameters = {"full_attention": base | (values.get("rope_scaling") or {}), "sliding_attention": base}
    if not parameters:
        return values
    spellings = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    others = {name: values[name] for name in values if name not in spellings}
    if hasattr(LlamaConfig, "rope_parameters"):
        return {**others, "rope_parameters": parameters}
    require_one_base(model_type, parameters)
    return {**others, **rope_of_version_4(parameters)}


def _experts_as_read_here(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the number of experts under the name that either transformers reads."""
    if "num_local_experts" not in values:
        return values
    others = {name: value for name, value in values.items() if name != "num_local_experts"}
    return {"num_experts": values["num_local_experts"], **others}


class IRLlamaConfig(InformedRouting, LlamaConfig):
    model_type = "ir_llama"


class IRMistralConfig(InformedRouting, MistralConfig):
    model_type = "ir_mistral"


class IRQwen2Config(InformedRouting, Qwen2Config):
    model_type = "ir_qwen2"


class IRQwen3Config(InformedRouting, Qwen3Config):
    model_type = "ir_qwen3"


class IRGemma2Config(InformedRouting, Gemma2Config):
    model_type = "ir_gemma2"


class IRGemma3TextConfig(InformedRouting, Gemma3TextConfig):
    model_type = "ir_gemma3_text"


class IRPhi3Config(InformedRouting, Phi3Config):
    model_type = "ir_phi3"


class IROlmo2Config(InformedRouting, Olmo2Config):
    model_type = "ir_olmo2"


class IRSmolLM3Config(InformedRouting, SmolLM3Config):
    model_type = "ir_smollm3"


class IRGraniteConfig(InformedRouting, GraniteConfig):
    model_type = "ir_granite"


class IRQwen3MoeConfig(InformedRouting, Qwen3MoeConfig):
    model_type = "ir_qwen3_moe"


class IRMixtralConfig(InformedRouting, MixtralConfig):
    model_type = "ir_mixtral"


class IROlmoeConfig(InformedRouting, OlmoeConfig):
    model_type = "ir_olmoe"


class IRSeedOssConfig(InformedRouting, SeedOssConfig):
    model_type = "ir_seed_oss"


class IRGemmaConfig(InformedRouting, GemmaConfig):
    model_type = "ir_gemma"


class IROlmo3Config(InformedRouting, Olmo3Config):
    model_type = "ir_olmo3"


class IRExaone4Config(InformedRouting, Exaone4Config):
    model_type = "ir_exaone4"


CONFIGS = {
    config.model_type: config
    for config in (
        IRLlamaConfig,
        IRMistralConfig,
        IRQwen2Config,
        IRQwen3Config,
        IRGemma2Config,
        IRGemma3TextConfig,
        IRPhi3Config,
        IROlmo2Config,
        IRSmolLM3Config,
        IRGraniteConfig,
        IRQwen3MoeConfig,
        IRMixtralConfig,
        IROlmoeConfig,
        IRSeedOssConfig,
        IRGemmaConfig,
        IROlmo3Config,
        IRExaone4Config,
    )
}
for _config in CONFIGS.values():
    _config.register_for_auto_class()  # save_pretrained copies this file

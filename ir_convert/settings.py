"""What a configuration says that decides what a model computes: a routing was measured under these settings."""

from typing import Any

from transformers import PretrainedConfig

from .rope import all_rope_parameters

DECISIVE = (
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "no_rope_layers",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "num_experts_per_tok",
    "norm_topk_prob",
    "original_max_position_embeddings",
)


def settings(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the settings by name, those of the position embedding as ``rope.NAME``; JSON-able."""
    found = {name: getattr(config, name) for name in DECISIVE if getattr(config, name, None) is not None}
    return found | _flat("rope", all_rope_parameters(config))


def changes(before: dict[str, Any], config: PretrainedConfig) -> list[str]:
    """Returns what has changed since, a phrase each: ``rms_norm_eps was 1e-05, is 1e-06``."""
    now = settings(config)
    # None, False and 0 say the same; older files lack some names.
    names = [name for name in before | now if (before.get(name) or None) != (now.get(name) or None)]
    return [f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names]


def _flat(name: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(f"{name}.{key}", value) if isinstance(value, dict) else {f"{name}.{key}": value}
    return {key: value for key, value in flat.items() if value is not None}


def _short(value: Any) -> str:
    return f"[{value[0]}, ...]" if isinstance(value, list) and len(value) > 1 else str(value)

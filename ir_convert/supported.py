"""What a model's configuration may ask for: anything else is named in one line before any work is done."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from .errors import UserError
from .families import ACTIVATIONS, Experts, Family, experts_of, family_of
from .rope import FULL, SLIDING, TYPES, all_rope_parameters

PER_KIND = ("gemma3_text", "olmo3")  # whose layers of each kind have a position embedding of their own
COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def require_supported(config: PretrainedConfig) -> Family:
    """Returns the family of a configuration all of whose settings are supported.

    Raises:
        UserError: the family is unknown, or a setting is not supported.
    """
    family = family_of(config)
    if int(transformers.__version__.split(".")[0]) < family.transformers:
        raise UserError(
            f"models of type '{config.model_type}' need transformers {family.transformers} or newer, and this is "
            f"{transformers.__version__}"
        )
    activation = getattr(config, family.activation, None)
    if activation not in ACTIVATIONS:
        raise UserError(
            f"activation '{activation}' ({family.activation}) in the MLP is not supported: "
            f"convert a model with {' or '.join(ACTIVATIONS)}"
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        by = f"'{method}'" if method else "an unnamed method"
        raise UserError(f"weights quantised by {by} are not read: convert the model they were made from")
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and padding >= config.vocab_size:
        raise UserError(
            f"pad_token_id is {padding}, the vocabulary has 0 to {config.vocab_size - 1}: set it to null in config.json"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "use_bidirectional_attention is true: this model encodes text and does not generate it; convert a causal one"
        )
    for name in COUNTS:
        if (value := getattr(config, name, None)) is not None and value < 1:
            raise UserError(f"{name} is {value} in config.json: it counts what a model has, so it is 1 at the least")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}: correct config.json"
        )
    if (limit := getattr(config, "clip_qkv", None)) is not None:
        raise UserError(f"clip_qkv is {limit}: queries, keys and values that are clipped are not supported")
    _require_kinds_of_layers(config, family)
    for rope in _ropes(config):
        theta = rope.get("rope_theta")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
            raise UserError(f"rope_theta is {theta!r} in config.json: a positive number is expected")
        if (kind := rope.get("rope_type", "default")) not in TYPES:
            raise UserError(f"position embedding of type '{kind}' (rope_type) is not supported: use {', '.join(TYPES)}")
    if family.residual_multiplier(config) == 0:
        raise UserError("residual_multiplier is 0: no unit adds anything, there is nothing to route")
    if (experts := experts_of(config)) is not None:
        _require_experts_everywhere(config, experts)
    return family


def _require_kinds_of_layers(config: PretrainedConfig, family: Family) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return
    if len(kinds) != config.num_hidden_layers:
        raise UserError(
            f"layer_types has {len(kinds)} entries for {config.num_hidden_layers} layers: correct config.json"
        )
    if unknown := sorted({str(kind) for kind in kinds} - {FULL, SLIDING}):
        raise UserError(
            f"layers of type '{unknown[0]}' (layer_types) are not supported: convert a model with {FULL}, {SLIDING}"
        )
    window = getattr(config, "sliding_window", None)
    if SLIDING in kinds and family.windows and not (isinstance(window, int) and window >= 1):
        raise UserError(
            f"sliding_window is {window!r}, and layer_types has {SLIDING}: a whole number from 1 on is expected"
        )


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Returns the settings of the position embedding: those of all layers, or of each kind of layer."""
    parameters = all_rope_parameters(config)
    if not {FULL, SLIDING} & set(parameters):
        return [parameters]
    ropes = [parameters.get(kind) for kind in (FULL, SLIDING)]
    if config.model_type not in PER_KIND or not all(isinstance(rope, dict) for rope in ropes):
        raise UserError(
            f"rope_parameters names kinds of layers: {FULL} and {SLIDING} are expected, in models of type {' and '.join(PER_KIND)} "
            "alone"
        )
    if any(rope.get("rope_type") == "longrope" for rope in ropes if rope):
        raise UserError("rope_parameters of a kind of layers has rope_type 'longrope': that is not supported there")
    return [rope for rope in ropes if rope]


def _require_experts_everywhere(config: PretrainedConfig, experts: Experts) -> None:
    if not 1 <= experts.active <= experts.count:
        raise UserError(
            f"num_experts_per_tok is {experts.active}, and there are {experts.count} experts: correct config.json"
        )
    # One budget of FLOPs holds for every layer.
    for name, value, plain in (
        ("mlp_only_layers", getattr(config, "mlp_only_layers", None) or [], []),
        ("decoder_sparse_step", getattr(config, "decoder_sparse_step", 1), 1),
    ):
        if value != plain:
            raise UserError(
                f"{name} is {value}: models in which some layers have experts and others have none are not supported; "
                f"convert one with {name} {plain}"
            )

"""Where each model family keeps its units, norms and projections. A new family is one entry in ``FAMILIES``.

Every family here is pre-norm: ``x <- x + unit(norm(x))`` for attention, then for the MLP.
"""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from .errors import UserError

UNITS = ("attention", "mlp")


@dataclass(frozen=True)
class Unit:
    """One unit of a decoder layer, by the names its parts have inside the layer.

    Attributes:
        module: the unit's module, e.g. ``self_attn``.
        norm: the RMS norm whose output the unit sees.
        skipped: the projections that an approximated token saves.
        kept: the projections that run for every token (attention's K and V, so that later tokens can attend to it).
        extras: further tensors inside the module (per-head norms).
    """

    module: str
    norm: str
    skipped: tuple[str, ...]
    kept: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    attention: Unit
    mlp: Unit
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def unit(self, name: str) -> Unit:
        return {"attention": self.attention, "mlp": self.mlp}[name]


_ATTENTION = Unit("self_attn", "input_layernorm", ("q_proj", "o_proj"), ("k_proj", "v_proj"))
_ATTENTION_QK_NORM = replace(_ATTENTION, extras=("q_norm", "k_norm"))
_MLP = Unit("mlp", "post_attention_layernorm", ("gate_proj", "up_proj", "down_proj"))

FAMILIES = {
    "llama": Family(_ATTENTION, _MLP),
    "mistral": Family(_ATTENTION, _MLP),
    "qwen2": Family(_ATTENTION, _MLP),
    "qwen3": Family(_ATTENTION_QK_NORM, _MLP),
}


def family_of(config: PretrainedConfig) -> Family:
    """Returns the family of a model's configuration.

    Raises:
        UserError: the family is unknown, or the configuration asks for something that is not supported.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"model family '{config.model_type}' is not known; known families: {known} "
            "(a new one is an entry in ir_convert/families.py)"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UserError(f"activation '{config.hidden_act}' in the MLP is not supported; only 'silu' is")
    return family


def head_dim(config: PretrainedConfig) -> int:
    """Returns the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def projection_sizes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Returns the (input, output) widths of every linear projection of a decoder layer, by projection name."""
    d, f, head = config.hidden_size, config.intermediate_size, head_dim(config)
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }


def sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """Returns, for each layer, how many positions back a token may look (itself included); None where all."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    return [window if kind == "sliding_attention" else None for kind in kinds]

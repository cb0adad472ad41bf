"""Where each model family keeps its units, norms and projections. A new family is one entry in ``FAMILIES``.

What a unit adds to the residual stream is what is forecast and replaced, so it includes all that follows the unit:

    x <- x + residual_multiplier * post_norm(unit(norm(x)))        for attention, then for the MLP

Most families have no post norm and a multiplier of 1. Forecaster and router see h = norm(x), as the unit does. A family
without a norm before the unit (OLMo 2) gives the unit x itself; forecaster and router then see x divided by its root mean
square, the norm without weights, for x grows from layer to layer and they must not have to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from .errors import UserError
from .rope import SLIDING, rope_parameters

UNITS = ("attention", "mlp")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Unit:
    """One unit of a decoder layer, by the names its parts have inside the layer.

    Attributes:
        module: the unit's module, e.g. ``self_attn``.
        norm: the RMS norm whose output the unit sees; None where it sees the stream itself.
        skipped: the projections that an approximated token saves.
        kept: the projections that run for every token (attention's K and V, so that later tokens can attend to it).
        extras: further tensors inside the module: norms of queries and keys, of each head by itself.
        whole_norms: whether those norms are over all heads together instead.
        post_norm: the RMS norm of the unit's output, saved with it.
        packed: tensors inside the module that hold the rows of several projections, in this order.
        experts: the list of expert MLPs inside the module; ``gate`` beside it scores them for each token.
    """

    module: str
    norm: str | None
    skipped: tuple[str, ...]
    kept: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    whole_norms: bool = False
    post_norm: str | None = None
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: str | None = None


Number = Callable[[PretrainedConfig], float]
Cap = Callable[[PretrainedConfig], float | None]


def _one(_: PretrainedConfig) -> float:
    return 1.0


def _none(_: PretrainedConfig) -> None:
    return None


def _field(name: str) -> Callable[[PretrainedConfig], float]:
    return lambda config: getattr(config, name)


def _root_of_width(config: PretrainedConfig) -> float:
    return config.hidden_size**0.5


def _by_head_dim(config: PretrainedConfig) -> float:
    return head_dim(config) ** -0.5


@dataclass(frozen=True)
class Family:
    """A model family. The functions take a configuration; they give 1 or None where the family has no such thing.

    Attributes:
        activation: the configuration's field that names the MLP's activation.
        norm_offset: RMS norms multiply by (this + weight).
        embedding_scale: the embedding's output is multiplied by it.
        attention_scale: queries times keys are multiplied by it.
        attention_softcap: c, where scores become c tanh(score / c), before the mask.
        residual_multiplier: what a unit adds is multiplied by it.
        logit_divisor: logits are divided by it.
        logit_softcap: the same for logits.
        rope_layers: one truth value a layer: whether its queries and keys are rotated; None where all are.
        windows: whether the configuration's sliding_window counts: some have the field left over from another family.
        transformers: the oldest major version of transformers whose layers can be routed.
    """

    attention: Unit
    mlp: Unit
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    embedding_scale: Number = _one
    attention_scale: Number = _by_head_dim
    attention_softcap: Cap = _none
    residual_multiplier: Number = _one
    logit_divisor: Number = _one
    logit_softcap: Cap = _none
    rope_layers: Callable[[PretrainedConfig], Sequence[int] | None] = _none
    windows: bool = True
    transformers: int = 4
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def unit(self, name: str) -> Unit:
        return {"attention": self.attention, "mlp": self.mlp}[name]


_ATTENTION = Unit("self_attn", "input_layernorm", ("q_proj", "o_proj"), ("k_proj", "v_proj"))
_ATTENTION_QK_NORM = replace(_ATTENTION, extras=("q_norm", "k_norm"))
_MLP = Unit("mlp", "post_attention_layernorm", ("gate_proj", "up_proj", "down_proj"))
_MIXTURE = replace(_MLP, skipped=("gate", *_MLP.skipped), experts="experts")
_SANDWICH_MLP = replace(_MLP, norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")

_MISTRAL = Family(_ATTENTION, _MLP)
_LLAMA = replace(_MISTRAL, windows=False)
_GEMMA2 = Family(
    replace(_ATTENTION, post_norm="post_attention_layernorm"),
    _SANDWICH_MLP,
    activation="hidden_activation",
    norm_offset=1.0,
    embedding_scale=_root_of_width,
    attention_scale=lambda config: config.query_pre_attn_scalar**-0.5,
    attention_softcap=_field("attn_logit_softcapping"),
    logit_softcap=_field("final_logit_softcapping"),
)

_OLMO2 = Family(
    replace(_ATTENTION_QK_NORM, whole_norms=True, norm=None, post_norm="post_attention_layernorm"),
    replace(_MLP, norm=None, post_norm="post_feedforward_layernorm"),
    windows=False,
)


def _rotates_locally(config: PretrainedConfig) -> list[bool] | None:
    """EXAONE 4: where some layers have a window, those alone rotate."""
    return None if config.sliding_window is None else [kind == SLIDING for kind in config.layer_types]


FAMILIES = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _MISTRAL,
    "qwen3": Family(_ATTENTION_QK_NORM, _MLP),
    "seed_oss": _LLAMA,
    "gemma": replace(_LLAMA, norm_offset=1.0, embedding_scale=_root_of_width),
    "gemma2": _GEMMA2,
    # Its configuration has a soft cap for attention as well, and its code in transformers does not use it.
    "gemma3_text": replace(
        _GEMMA2, attention=replace(_GEMMA2.attention, extras=("q_norm", "k_norm")), attention_softcap=_none
    ),
    "phi3": Family(
        replace(_ATTENTION, packed={"qkv_proj": ("q_proj", "k_proj", "v_proj")}),
        replace(_MLP, packed={"gate_up_proj": ("gate_proj", "up_proj")}),
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows=True),
    "exaone4": replace(
        _OLMO2, attention=replace(_OLMO2.attention, whole_norms=False), windows=True, rope_layers=_rotates_locally
    ),
    "smollm3": replace(_MISTRAL, rope_layers=lambda config: config.no_rope_layers),
    "granite": replace(
        _LLAMA,
        embedding_scale=_field("embedding_multiplier"),
        attention_scale=_field("attention_multiplier"),
        residual_multiplier=_field("residual_multiplier"),
        logit_divisor=_field("logits_scaling"),
    ),
    "qwen3_moe": Family(_ATTENTION_QK_NORM, _MIXTURE),
    "mixtral": Family(_ATTENTION, _MIXTURE, transformers=5),
    "olmoe": Family(replace(_ATTENTION_QK_NORM, whole_norms=True), _MIXTURE, windows=False, transformers=5),
}


def family_of(config: PretrainedConfig) -> Family:
    """Returns the family of a model's configuration.

    Raises:
        UserError: the family is unknown.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        if getattr(config, "text_config", None) is not None:
            raise UserError(
                f"model family '{config.model_type}' is not a text model, and its language model of family "
                f"'{config.text_config.model_type}' is not known; known families: {known}"
            )
        raise UserError(
            f"model family '{config.model_type}' is not known; known families: {known} "
            "(a new one is an entry in ir_convert/families.py)"
        )
    return family


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many there are, how many run for each token, and how wide each is."""

    count: int
    active: int
    width: int


def experts_of(config: PretrainedConfig) -> Experts | None:
    """Returns the experts of every layer's MLP; None where it has none."""
    if family_of(config).mlp.experts is None:
        return None
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return Experts(config.num_experts, config.num_experts_per_tok, width)


def head_dim(config: PretrainedConfig) -> int:
    """Returns the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def projection_sizes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Returns the (input, output) widths of every linear projection that a token runs through in a layer, by name.

    Of a mixture, the experts that run for one token count as one wide MLP, and ``gate`` scores them.
    """
    d, head, experts = config.hidden_size, head_dim(config), experts_of(config)
    f = config.intermediate_size if experts is None else experts.active * experts.width
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }
    return sizes if experts is None else sizes | {"gate": (d, experts.count)}


def packed_rows(config: PretrainedConfig, unit: str, projection: str) -> tuple[str, slice | None]:
    """Returns the tensor inside a unit's module that holds a projection, and its rows there; None for all of them."""
    sizes = projection_sizes(config)
    for tensor, projections in family_of(config).unit(unit).packed.items():
        if projection in projections:
            start = sum(sizes[name][1] for name in projections[: projections.index(projection)])
            return tensor, slice(start, start + sizes[projection][1])
    return projection, None


def layer_matrices(config: PretrainedConfig) -> list[tuple[int, int, int]]:
    """Returns (input, output) widths of one layer's linear projections, all experts' included, and how many have these."""
    sizes, experts = projection_sizes(config), experts_of(config)
    if experts is None:
        return [(*size, 1) for size in sizes.values()]
    d, mixed = config.hidden_size, set(family_of(config).mlp.skipped) - {"gate"}
    others = [(*size, 1) for name, size in sizes.items() if name not in mixed]
    return [*others, (d, experts.width, 2 * experts.count), (experts.width, d, experts.count)]


def layer_parameters(config: PretrainedConfig) -> int:
    """Returns how many weights the linear projections of one layer have, all experts' included."""
    return sum(count * inputs * outputs for inputs, outputs, count in layer_matrices(config))


def sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """Returns, for each layer, how many positions back a token may look (itself included); None where all."""
    window = getattr(config, "sliding_window", None)
    if not family_of(config).windows or not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def onnx_unsupported(config: PretrainedConfig) -> str | None:
    """Returns the first feature of a model that the ONNX graph does not build, None where it builds all of it."""
    family = family_of(config)
    activation = getattr(config, family.activation, None)
    ropes = [rope_parameters(config, layer) for layer in range(config.num_hidden_layers)]
    features = {
        f"a mixture of experts with activation '{activation}'": family.mlp.experts is not None and activation != "silu",
        "position embeddings that follow the text's length (rope_type 'dynamic')": any(
            rope.get("rope_type") == "dynamic" for rope in ropes
        ),
    }
    return next((feature for feature, present in features.items() if present), None)

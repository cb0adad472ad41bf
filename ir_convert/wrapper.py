"""The language model in a multimodal checkpoint: its configuration, and its tensors by the names that they have in one of text alone."""

from transformers import AutoConfig, PretrainedConfig

from .errors import UserError
from .families import FAMILIES
from .rope import all_rope_parameters

# How names begin in the spellings that transformers has had: inside, and alone.
PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
    **{part: part for part in ("model.embed_tokens.", "model.layers.", "model.norm.")},
}
# Language models that are a family's but for the positions of images, which have three numbers each: text's are all the same.
TWINS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
TWINS |= {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}  # as version 4 of transformers reads what was published
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
OUTER = ("bos_token_id", "eos_token_id", "quantization_config")  # what the outer configuration decides
NOT_CAUSAL = ("paligemma",)


def language_model(config: PretrainedConfig) -> PretrainedConfig | None:
    """Returns the configuration of the language model that a multimodal one wraps; None where there is none of a known family.

    Raises:
        UserError: it is not causal.
    """
    text = getattr(config, "text_config", None)
    if config.model_type in FAMILIES or text is None or text.model_type not in (*FAMILIES, *TWINS):
        return None
    if text.model_type in TWINS:
        text = _twin(text)
    if config.model_type in NOT_CAUSAL:
        raise UserError(
            f"in '{config.model_type}' a prompt's tokens see those that follow them: convert a causal model"
        )
    for name in OUTER:
        if (value := getattr(config, name, None)) is not None:
            setattr(text, name, value)
    if text.pad_token_id is None:
        text.pad_token_id = getattr(config, "pad_token_id", None)
    # Versions of transformers differ in whose word counts; a head that is there and another than the embedding settles it.
    text.tie_word_embeddings = text.tie_word_embeddings or bool(getattr(config, "tie_word_embeddings", False))
    return text


def _twin(text: PretrainedConfig) -> PretrainedConfig:
    values = {name: value for name, value in text.to_dict().items() if name not in ("model_type", *ROPE)}
    rope = {
        name: "default" if value == "mrope" else value
        for name, value in all_rope_parameters(text).items()
        if name not in ("type", "mrope_section", "mrope_interleaved")
    }
    return AutoConfig.for_model(TWINS[text.model_type], **values, rope_parameters=rope)


def own_name(name: str) -> str | None:
    """Returns the name that a tensor of a multimodal checkpoint has in its language model; None where it is of another part."""
    return next((own + name.removeprefix(part) for part, own in PARTS.items() if name.startswith(part)), None)

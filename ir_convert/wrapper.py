"""The language model in a multimodal checkpoint: its configuration, and its tensors by the names that they have in one of text alone."""

from transformers import PretrainedConfig

from .errors import UserError
from .families import FAMILIES

# How names begin in the spellings that transformers has had: inside, and alone.
PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
}
OUTER = ("bos_token_id", "eos_token_id", "quantization_config")  # what the outer configuration decides
NOT_CAUSAL = ("paligemma",)


def language_model(config: PretrainedConfig) -> PretrainedConfig | None:
    """Returns the configuration of the language model that a multimodal one wraps; None where there is none of a known family.

    Raises:
        UserError: it is not causal.
    """
    text = getattr(config, "text_config", None)
    if config.model_type in FAMILIES or text is None or text.model_type not in FAMILIES:
        return None
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


def own_name(name: str) -> str | None:
    """Returns the name that a tensor of a multimodal checkpoint has in its language model; None where it is of another part."""
    return next((own + name.removeprefix(part) for part, own in PARTS.items() if name.startswith(part)), None)

"""The language model in a multimodal checkpoint: its configuration, and its tensors by the names that they have in one of text alone."""

from transformers import PretrainedConfig

from .families import FAMILIES

# How names begin in the two spellings that transformers has had: inside, and alone.
PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # what the outer configuration decides


def language_model(config: PretrainedConfig) -> PretrainedConfig | None:
    """Returns the configuration of the language model that a multimodal one wraps; None where there is none of a known family."""
    text = getattr(config, "text_config", None)
    if config.model_type in FAMILIES or text is None or text.model_type not in FAMILIES:
        return None
    for name in OUTER:
        if (value := getattr(config, name, None)) is not None:
            setattr(text, name, value)
    return text


def own_name(name: str) -> str | None:
    """Returns the name that a tensor of a multimodal checkpoint has in its language model; None where it is of another part."""
    return next((own + name.removeprefix(part) for part, own in PARTS.items() if name.startswith(part)), None)

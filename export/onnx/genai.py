"""``genai_config.json``: what onnxruntime-genai must know to run the model that lies beside it."""

import json
from pathlib import Path
from typing import Any

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError, one_line
from ir_convert.families import head_dim

from .rotary import long_text_bound

FILE = "genai_config.json"
# genai's name for a decoder with a key-value cache and nothing special: right for every family, known or to come.
TYPE = "decoder"
# The same, but that genai runs a text anew when its 4097th token comes, whatever the model's own bound: see ``long_text_bound``.
LONG_TYPE, LONG_BOUND = "phi3", 4096
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_ERRORS_ONLY = 3


def write(checkpoint: Checkpoint, folder: Path, name: str) -> None:
    """Writes ``genai_config.json`` beside the model file ``name``; see ``settings``."""
    text = json.dumps(settings(checkpoint, name), indent=2, ensure_ascii=False)  # genai knows no escapes
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def settings(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Returns the configuration, in genai's own terms.

    Args:
        checkpoint: the base model.
        name: file name of the model.

    Raises:
        UserError: the base model's ``generation_config.json`` is damaged.
    """
    config, generation = checkpoint.config, _generation(checkpoint)
    return {
        "model": {
            "type": LONG_TYPE if long_text_bound(config) == LONG_BOUND else TYPE,
            **_tokens(checkpoint, generation),
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "decoder": {
                "filename": name,
                # The optional input routing_threshold would draw a warning from every load.
                "session_options": {"log_severity_level": _ERRORS_ONLY, "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": head_dim(config),
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **{key: generation[key] for key in SAMPLING if key in generation},
            # One buffer as long as the longest text is input and output of every call: the graph writes in it in place.
            "past_present_share_buffer": True,
        },
    }


def _tokens(checkpoint: Checkpoint, generation: dict[str, Any]) -> dict[str, int | list[int]]:
    """Returns the special tokens that the base model has; for one that is missing, genai asks the tokenizer."""
    tokens = {
        key: generation.get(key, getattr(checkpoint.config, key, None))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ends = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None or tokens["pad_token_id"] < 0:
        # genai tells the shorter prompts of a batch by their padding, so there has to be some.
        tokens["pad_token_id"] = next(iter(ends), None) if isinstance(ends, list) else ends
    return {key: token for key, token in tokens.items() if token is not None}


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what the base model's ``generation_config.json`` says.

    Raises:
        UserError: it is no JSON object.
    """
    for file in checkpoint.files(("generation_config.json",)):
        try:
            said = json.loads(file.read_text("utf-8")).items()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {one_line(error)}") from error
        return {key: value for key, value in said if value is not None}
    return {}

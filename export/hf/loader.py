"""Loads an exported checkpoint with the code of this package; the code in the folder is not run."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ir_convert.errors import UserError

from . import modeling_ir

MODELS = {model.config_class.model_type: model for model in modeling_ir.MODELS}


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint written by ``write``.

    Args:
        folder: a local folder.
        **kwargs: for ``from_pretrained``; ``dtype`` is "auto" (the checkpoint's) unless given.

    Raises:
        UserError: the folder holds no such checkpoint.
    """
    path = Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; name a folder written by ir-convert") from error
    if model_type not in MODELS:
        raise UserError(
            f"{folder} is not an informed-routing checkpoint (model type '{model_type}'); write one with ir-convert"
        )
    return MODELS[model_type].from_pretrained(folder, **{"dtype": "auto", **kwargs})


def load_tokenizer(folder: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside a loaded checkpoint, without asking for the folder's code."""
    return AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=False)

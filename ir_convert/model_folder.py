"""A base model's folder: fetched from the Hub, its weight files found, and what is wrong where it is none."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .errors import UserError, one_line
from .files import require_readable

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", ADAPTER)


def download(model: str) -> Path:
    """Returns the folder of a Hub id in the Hub's cache; UserError where it is none, or cannot be had."""
    from huggingface_hub import snapshot_download

    if Path(model).is_file():
        raise UserError(f"model '{model}' is a file: name the folder that it lies in")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(
            f"model folder '{model}' does not exist: name a local folder or a Hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        # Weights in safetensors, configuration and tokenizer; never Python files, never pickles.
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"],
                # In other folders are the same weights once more, in other formats; and chat templates.
                ignore_patterns=["consolidated*", *(f"*/*.{kind}" for kind in ("safetensors", "json", "txt"))],
            )
        )
    except Exception as error:  # what the Hub, a proxy and the network make it raise shares no base class
        raise UserError(
            f"'{model}' is neither a local folder nor a model that can be fetched from the Hub: {one_line(error)}"
        ) from error


def shards_of(path: Path) -> dict[str, str]:
    """Returns the files of a checkpoint folder's tensors by the tensors' names; UserError where one is missing or damaged."""
    if (path / SINGLE).is_file():  # transformers, too, takes it where there are both
        require_readable(path / SINGLE)
        try:
            with safe_open(path / SINGLE, "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / SINGLE} is damaged: {one_line(error)}; download it again") from error
    if (path / INDEX).is_file():
        try:
            index = json.loads((path / INDEX).read_text("utf-8"))
            shards = {name: os.fspath(file) for name, file in index["weight_map"].items()}  # names, or TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / INDEX} is damaged: {one_line(error)}; download it again") from error
        for shard in set(shards.values()):
            if os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise UserError(f"{path / INDEX} names a file outside its folder: '{shard}'")
            require_readable(path / shard)
            if not (path / shard).is_file():
                raise UserError(f"{path} lacks the weight file '{shard}' that its index names; download it again")
        return shards
    raise UserError(
        f"{path} has no '{SINGLE}' or '{INDEX}'; other weight formats are not read "
        "(save_pretrained of a recent transformers writes safetensors)"
    )


def why_no_config(path: Path, error: Exception) -> str:
    """Returns why transformers could not read a folder's configuration, in one line."""
    config = path / "config.json"
    if not config.is_file():
        adapter = ", but an adapter: merge it into its base model" if (path / ADAPTER).is_file() else ""
        return f"{path} has no config.json: not a Hugging Face model folder{adapter}"
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError:
        return f"{config} is not valid JSON"
    except OSError as failed:
        return f"{config} cannot be read: {failed.strerror}"
    if isinstance(content, dict) and "routing_threshold" in content:
        return f"{path} was written by ir-convert: it is routed already; convert its base model"
    if isinstance(content, dict) and "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING_NAMES:
        return f"{path} needs code of its own (auto_map) to load; such models are not converted"
    if isinstance(content, dict) and _rope_type(content) == "su":
        return f"{config} has rope_scaling of type 'su', which is called 'longrope' today: write that there"
    return f"{config} cannot be read: {one_line(error)}"


def _rope_type(content: dict[str, Any]) -> Any:
    scaling = content.get("rope_scaling")
    return scaling.get("type") if isinstance(scaling, dict) else None

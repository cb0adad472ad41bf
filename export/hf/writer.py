"""Writes a Hugging Face checkpoint: base weights and routing in one model, with the code that runs it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ir_convert import __version__
from ir_convert.checkpoint import Checkpoint
from ir_convert.families import UNITS
from ir_convert.files import sync
from ir_convert.model_folder import INDEX, SINGLE
from ir_convert.rope import all_rope_parameters
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit

from ..finite import require_finite
from ..tokenizer import name_class
from . import CODE
from .card import model_card
from .configuration_ir import rope_of_version_4
from .loader import MODELS

ROPE = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
SHARD_BYTES = 2 * 10**9

# Names in a RoutedUnit (units.py) and in the module of the checkpoint (routed_ir.py).
PARAMETERS = {
    "forecaster.down": "forecaster.down.weight",
    "forecaster.down_bias": "forecaster.down.bias",
    "forecaster.up": "forecaster.up.weight",
    "forecaster.bias": "forecaster.up.bias",
    "router.hidden": "router.hidden.weight",
    "router.hidden_bias": "router.hidden.bias",
    "router.out": "router.score.weight",
    "router.out_bias": "router.score.bias",
}


def write(
    checkpoint: Checkpoint,
    routing: Routing,
    folder: Path,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a complete checkpoint into an existing, empty folder.

    Args:
        checkpoint: the base model.
        routing: what calibration learnt for it.
        folder: where to; the caller makes it appear whole.
        dtype: of the weights; None for what the base has.
        on_progress: called with (layers written, layers).
        shard_bytes: weight files are about this large at most, and so is the memory needed.
    """
    checkpoint = checkpoint.with_lora(routing.lora)
    dtype = dtype or checkpoint.stored_dtype
    _write_json(folder / "config.json", _config(checkpoint, routing, dtype))
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    checkpoint.copy_to(folder)
    name_class(checkpoint, folder)
    (folder / "README.md").write_text(model_card(checkpoint, routing), "utf-8")
    routing.save(folder / "routing.safetensors")
    _write_shards(_tensors(checkpoint, routing, dtype, on_progress), folder, shard_bytes)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _config(checkpoint: Checkpoint, routing: Routing, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the base's configuration as its author wrote it, the routing added."""
    values = checkpoint.written_config
    for name in ("_name_or_path", "torch_dtype", *ROPE):
        values.pop(name, None)
    if values.get("output_router_logits"):
        values["output_router_logits"] = False  # approximated tokens have none
    model = MODELS[f"ir_{checkpoint.config.model_type}"]
    configuration = model.config_class
    layers, activation = checkpoint.config.num_hidden_layers, checkpoint.family.activation
    return (
        values
        | _rope(checkpoint)
        | {
            "model_type": configuration.model_type,
            "architectures": [model.__name__],
            "auto_map": {
                "AutoConfig": f"configuration_ir.{configuration.__name__}",
                "AutoModelForCausalLM": f"modeling_ir.{model.__name__}",
            },
            activation: getattr(checkpoint.config, activation),
            "dtype": str(dtype).removeprefix("torch."),
            "tie_word_embeddings": checkpoint.tied,
            "forecaster_rank": _sizes(routing, layers, lambda unit: unit.forecaster.rank),
            "router_width": _sizes(routing, layers, lambda unit: unit.router.width),
            "kv_cache": routing.kv_cache,
            "sparsity": routing.sparsity,
            # JSON has no infinity; float() reads the string.
            "routing_threshold": "-inf" if routing.sparsity <= 0 else routing.threshold,
            "sparsity_curve": {"sparsity": routing.curve.sparsity, "threshold": routing.curve.threshold},
            "ir_convert_version": __version__,
        }
    )


def _rope(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns RoPE's parameters in the spelling of transformers 5 and in that of 4."""
    parameters = all_rope_parameters(checkpoint.config)
    return {"rope_parameters": parameters, **rope_of_version_4(parameters)}


def _sizes(routing: Routing, layers: int, size: Callable[[RoutedUnit], int]) -> int | dict[str, list[int | None]]:
    """Returns one number where all units are routed and alike, else a list over layers for each unit."""
    sizes = {key: size(unit) for key, unit in routing.units.items()}
    if len(sizes) == layers * len(UNITS) and len(set(sizes.values())) == 1:
        return sizes[0, UNITS[0]]
    return {unit: [sizes.get((layer, unit)) for layer in range(layers)] for unit in UNITS}


def _tensors(
    checkpoint: Checkpoint, routing: Routing, dtype: torch.dtype, on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of the checkpoint by name, reading them one layer at a time."""
    family = checkpoint.family
    yield family.embedding, checkpoint.read(family.embedding, dtype)
    layers = checkpoint.config.num_hidden_layers
    for layer in range(layers):
        for name, tensor in checkpoint.read_layer(layer, dtype).items():
            yield f"{family.layers}.{layer}.{name}", tensor
        for unit in UNITS:
            prefix = f"{family.layers}.{layer}.{family.unit(unit).module}"
            if routed := routing.units.get((layer, unit)):
                for name, tensor in _parameters(routed).items():
                    yield f"{prefix}.{name}", tensor
        if on_progress:
            on_progress(layer + 1, layers)
    yield family.final_norm, checkpoint.read(family.final_norm, dtype)
    if not checkpoint.tied:
        yield family.head, checkpoint.read(family.head, dtype)


def _parameters(unit: RoutedUnit) -> dict[str, torch.Tensor]:
    """Returns a unit's forecaster and router as module parameters.

    They stay fp32 in the file at any precision of the weights: who loads the model in fp32 gets the very decisions of
    the calibration; in half precision transformers casts them, all but the routers' last layer.
    """
    return {PARAMETERS[name]: tensor.float().contiguous() for name, tensor in unit.tensors().items()}


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int) -> None:
    """Writes tensors as they come: one file where they fit, numbered files and an index where not."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, _part(folder, len(shards)), metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = require_finite(name, tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    if len(shards) == 1:
        _part(folder, 0).rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _part(folder, index).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.safetensors"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")

"""ONNX export: the routed decoder, its weights, and the files that ONNX Runtime users expect beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch

from ir_convert.checkpoint import TOKENIZER_FILES, Checkpoint
from ir_convert.errors import UserError
from ir_convert.files import sync
from ir_convert.routing import Routing

from .graph import decoder

__all__ = ["write"]

DTYPES = (torch.float32, torch.float16)
# Shape constants must stay inside the model file, so only tensors from this size on go to the data file.
INLINE_BYTES = 1024
PAGE = 4096


def write(
    checkpoint: Checkpoint,
    routing: Routing,
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the routed model into an existing, empty folder.

    ``{name}`` and its weights ``{name}.data``, ``config.json`` and ``generation_config.json`` of the base model, its
    tokenizer, and the routing file ``{stem}.routing.safetensors``. At most one weight is in memory at a time.

    Args:
        checkpoint: the base model.
        routing: its calibrated routing.
        folder: where to write; the caller moves it into place when it is whole.
        name: file name of the model, e.g. ``ir-llama.onnx``.
        dtype: of weights and activations: float32 or float16.
        on_progress: called with (weights written, all weights).

    Raises:
        UserError: the dtype or the model is not supported, or a weight is damaged.
    """
    if dtype not in DTYPES:
        known = " or ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise UserError(f"dtype {str(dtype).removeprefix('torch.')} is not supported in ONNX; choose {known}")
    layers = checkpoint.config.num_hidden_layers
    if foreign := [layer for layer, _ in routing.units if layer >= layers]:
        raise UserError(
            f"the routing is for {max(foreign) + 1} layers, {checkpoint.name} has {layers}: calibrate this model"
        )
    checkpoint = checkpoint.with_lora(routing.lora)

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if on_progress is not None:
            on_progress(info.index + 1, info.total)

    ir.save(
        decoder(checkpoint, routing, dtype),
        folder / name,
        external_data=f"{name}.data",
        size_threshold_bytes=INLINE_BYTES,
        alignment=PAGE,
        align_threshold=0,
        callback=report,
    )
    for file in checkpoint.files(("config.json", "generation_config.json", *TOKENIZER_FILES)):
        shutil.copyfile(file, folder / file.name)
    routing.save(folder / f"{Path(name).stem}.routing.safetensors")
    for path in [*folder.iterdir(), folder]:
        sync(path)

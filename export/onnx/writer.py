"""Writes the routed decoder, its weights, and the files that ONNX Runtime users expect beside it."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import PretrainedConfig

from ir_convert.checkpoint import Checkpoint
from ir_convert.choices import INT4_METHODS
from ir_convert.errors import UserError
from ir_convert.families import experts_of, onnx_unsupported
from ir_convert.files import sync
from ir_convert.routing import Routing

from ..tokenizer import name_class
from . import genai
from .graph import decoder
from .int4 import Int4

# ONNX Runtime 1.31 has CUDA kernels for all that the graph does in bfloat16; its CPU provider has none for MatMul, Add, Mul and
# Sigmoid.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Shape constants must stay inside the model file, so only tensors from this size on go to the data file.
INLINE_BYTES = 1024
PAGE = 4096
WORKERS = 2  # threads that read, convert and write weights; those of one quantised weight wait for each other


def check_dtype(dtype: torch.dtype) -> None:
    """Raises UserError where ONNX Runtime has no kernels for a model of this precision."""
    if dtype not in DTYPES:
        known = " or ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise UserError(f"dtype {str(dtype).removeprefix('torch.')} is not supported in ONNX; choose {known}")


def check_model(config: PretrainedConfig, int4: Int4 | None) -> None:
    """Raises UserError where the graph cannot be built for a model of this configuration, its units in int4 or not."""
    if (feature := onnx_unsupported(config)) is not None:
        raise UserError(f"ONNX export does not support {feature}; a checkpoint folder (--out NAME) does")
    experts = experts_of(config)
    if int4 is None or experts is None:
        return
    if not int4.whole_zero_points:
        raise UserError(
            f"--int4-method {int4.method} is not for a mixture of experts, whose operator takes whole zero points: choose "
            f"{' or '.join(method for method in INT4_METHODS if Int4(method).whole_zero_points)}"
        )
    for name, width in (("hidden size", config.hidden_size), ("experts' width", experts.width)):
        if width % int4.block:
            raise UserError(
                f"int4 experts need whole blocks of {int4.block} weights, and the {name} is {width}: leave --int4 and "
                "--calibrate-quantised away"
            )


def write(
    checkpoint: Checkpoint,
    routing: Routing,
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
    int4: Int4 | None = None,
    trace: bool = False,
    logits: str = "all",
) -> None:
    """Writes the routed model into an existing, empty folder.

    ``{name}`` and its weights ``{name}.data``, ``config.json`` and ``generation_config.json`` of the base model, its
    tokenizer, ``genai_config.json``, and the routing file ``{stem}.routing.safetensors``. At most ``WORKERS`` weights are in
    memory at a time.

    Args:
        checkpoint: the base model.
        routing: its calibrated routing.
        folder: where to write; the caller moves it into place when it is whole.
        name: file name of the model, e.g. ``ir-llama.onnx``.
        dtype: of weights and activations: float32, float16, or bfloat16, which runs on GPUs alone.
        on_progress: called with (weights begun, all weights).
        int4: how to quantise the units' projections; None for not at all. In float32 forecasters and routers are rounded to
            the nearest in int4 as well.
        trace: adds an output that says which tokens every unit executed.
        logits: of ``all`` tokens, or of each sequence's ``last``.

    Raises:
        UserError: the dtype or the model is not supported, or a weight is damaged.
    """
    check_dtype(dtype)
    check_model(checkpoint.config, int4)
    layers = checkpoint.config.num_hidden_layers
    if foreign := [layer for layer, _ in routing.units if layer >= layers]:
        raise UserError(
            f"the routing is for {max(foreign) + 1} layers, {checkpoint.name} has {layers}: calibrate this model"
        )
    checkpoint = checkpoint.with_lora(routing.lora)

    begun = count(1)

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if on_progress is not None:
            on_progress(next(begun), info.total)

    ir.save(
        decoder(checkpoint, routing, dtype, int4, trace, logits),
        folder / name,
        external_data=f"{name}.data",
        size_threshold_bytes=INLINE_BYTES,
        alignment=PAGE,
        align_threshold=0,
        callback=report,
        max_workers=WORKERS,
    )
    shutil.copyfile(checkpoint.path / "config.json", folder / "config.json")
    checkpoint.copy_to(folder)
    if checkpoint.wrapped:  # runtimes are to see a model of text alone
        (folder / "config.json").write_text(json.dumps(checkpoint.written_config, indent=2) + "\n", "utf-8")
        name_class(checkpoint, folder)
    genai.write(checkpoint, folder, name)
    routing.save(folder / f"{Path(name).stem}.routing.safetensors")
    for path in [*folder.rglob("*"), folder]:
        sync(path)

"""The whole pipeline, top to bottom."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .calibrate import calibrate, read_blocks
from .checkpoint import Checkpoint
from .errors import UserError
from .export import hf, onnx
from .outputs import Output, check_outputs
from .progress import Reporter, Silent
from .routing import Routing

DEFAULT_SPARSITY = 0.4


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Attributes:
        routing: the calibrated routing, figures in its metadata.
        sizes: bytes written, by output path.
        seconds: wall-clock time of the whole.
    """

    routing: Routing
    sizes: dict[Path, int]
    seconds: float


def convert(
    model: str,
    out: Sequence[Path],
    *,
    sparsity: float | None = None,
    calibration: Path | None = None,
    routing: Path | None = None,
    tokens: int = 65536,
    rank: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    report: Reporter | None = None,
) -> Conversion:
    """Converts a pretrained decoder-only language model into a routed one.

    Args:
        model: a local folder or a Hub id.
        out: outputs; ``*.onnx`` writes an ONNX model, ``*.safetensors`` the routing file, another name a checkpoint folder.
        sparsity: share of the decoder layers' FLOPs to save, in [0, 1); None for 0.4, or what ``routing`` was made for.
        calibration: a text file like what the model will serve; None for Python's documentation topics.
        routing: a routing file of an earlier conversion; it takes calibration's place.
        tokens: calibration tokens, at most.
        rank: of the forecasters; None chooses by the model's width.
        seed: of everything drawn at random.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` (float32 in ONNX, the base model's in a checkpoint), ``float32``, ``float16`` or ``bfloat16``.
        overwrite: replace outputs that exist.
        report: shows progress.

    Raises:
        UserError: one line that says what is wrong; nothing has been written then.
    """
    start, report = time.monotonic(), report or Silent()
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity:g} is not in [0, 1): it is the share of FLOPs to save, e.g. 0.4")
    outputs = [Output.parse(path) for path in out]
    target, checkpoint = _device(device), Checkpoint.open(model)
    check_outputs(outputs, checkpoint, overwrite, lambda output: _estimate(output, checkpoint, dtype))

    if routing is None:
        learned = calibrate(
            checkpoint,
            read_blocks(calibration, checkpoint.tokenizer, tokens),
            sparsity=DEFAULT_SPARSITY if sparsity is None else sparsity,
            rank=rank,
            seed=seed,
            device=target,
            report=report,
        )
    else:
        learned = _reuse(routing, checkpoint, sparsity)

    sizes = {}
    for output in outputs:
        layers = checkpoint.config.num_hidden_layers
        with report.stage(f"write {output.path.name}", layers) as advance:
            sizes[output.path] = output.write(partial(_fill, output, checkpoint, learned, dtype, advance))
    return Conversion(learned, sizes, time.monotonic() - start)


def _fill(
    output: Output, checkpoint: Checkpoint, routing: Routing, dtype: str, advance: Callable[[], None], folder: Path
) -> None:
    if output.kind == "routing":
        routing.save(folder / output.path.name)
    elif output.kind == "onnx":
        precision = _dtype(dtype) or torch.float32
        onnx.write(checkpoint, routing, folder, output.path.name, precision, lambda done, total: advance())
    else:
        hf.write(checkpoint, routing, folder, _dtype(dtype), lambda done, total: advance())


def _reuse(path: Path, checkpoint: Checkpoint, sparsity: float | None) -> Routing:
    """Reads a routing file made for this very model, and moves its dial to another sparsity if asked."""
    routing = Routing.load(path)
    if (made_for := routing.metadata["weights_sha256"]) != checkpoint.weights_sha256:
        raise UserError(
            f"{path} was made for other weights ({routing.metadata['base_model']}, sha256 {made_for[:12]}...) than "
            f"{checkpoint.name}: name the model it was made for, or calibrate again"
        )
    if sparsity is not None:
        routing.curve.at(sparsity)
        routing.metadata["sparsity"] = sparsity
    return routing


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here: try --device cpu") from error
    return device


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _estimate(output: Output, checkpoint: Checkpoint, dtype: str) -> int:
    """Returns the bytes that an output takes, routing included (about 2 % of the weights, generously)."""
    if output.kind == "routing":
        return checkpoint.weight_bytes // 20
    stored = checkpoint.stored_dtype.itemsize
    written = (_dtype(dtype) or (torch.float32 if output.kind == "onnx" else checkpoint.stored_dtype)).itemsize
    return int(checkpoint.weight_bytes * written / stored * 1.05)

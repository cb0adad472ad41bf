"""The whole pipeline, top to bottom."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import __version__
from .calibrate import Options, calibrate
from .calibrate.calibrate import check_reachable
from .calibrate.estimate import estimate
from .checkpoint import Checkpoint
from .data import Blocks, Source, read_blocks
from .errors import UserError
from .export import hf, onnx
from .families import UNITS
from .job import Job
from .outputs import Output, check_outputs
from .progress import Reporter, Silent
from .routing import Routing
from .stream import Team, Work


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Attributes:
        routing: the calibrated routing, figures in its metadata.
        sizes: bytes written, by output path; empty where everything had been done before.
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
    calibration: Sequence[str] = (),
    text_field: str = "text",
    tokens: int = 131072,
    block_size: int = 512,
    routing: Path | None = None,
    recipe: str = "local",
    polish: int = 0,
    lora: bool = False,
    steps: int = 2000,
    units: Sequence[str] = UNITS,
    rank: int | None = None,
    router_width: int | None = None,
    kv_cache: str = "full",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    report: Reporter | None = None,
) -> Conversion:
    """Converts a pretrained decoder-only language model into a routed one.

    An interrupted conversion leaves a folder ``.NAME.work`` beside its first output; the same call goes on there.

    Args:
        model: a local folder or a Hub id.
        out: outputs; ``*.onnx`` writes an ONNX model, ``*.safetensors`` the routing file, another name a checkpoint folder.
        sparsity: share of the decoder layers' FLOPs to save, in [0, 1); None for 0.4, or what ``routing`` was made for.
        calibration: text like what the model will serve: files, folders or data sets, each with ``=weight`` if wanted; none
            for Python's documentation topics.
        text_field: where JSON lines, Parquet files and data sets keep their text.
        tokens: calibration tokens, at most.
        block_size: tokens that are seen together.
        routing: a routing file of an earlier conversion; it takes calibration's place.
        recipe, polish, lora, steps, units, rank, router_width, kv_cache, seed: see ``calibrate.Options``.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` (float32 in ONNX, the base model's in a checkpoint), ``float32``, ``float16`` or ``bfloat16``.
        overwrite: replace outputs that exist.
        restart: forget an interrupted run's work.
        report: shows progress.

    Raises:
        UserError: one line that says what is wrong; no output has been touched then.
    """
    start, target = time.monotonic(), _device(device)
    outputs = [Output.parse(path) for path in out]
    _check_dtype(outputs, dtype)
    team = Team.assemble(target)
    target = team.device(target)
    report = report if report and team.rank == 0 else Silent()
    checkpoint = Checkpoint.open(model)
    if routing is not None:
        learned = _reuse(routing, checkpoint, sparsity)
        sizes = _write(outputs, checkpoint, learned, dtype, overwrite, report) if team.rank == 0 else {}
        return Conversion(learned, sizes, time.monotonic() - start)

    options = Options(
        recipe=recipe,
        sparsity=Options.sparsity if sparsity is None else sparsity,
        units=tuple(units),
        rank=rank,
        router_width=router_width,
        kv_cache=kv_cache,
        polish=polish,
        lora=lora,
        steps=steps,
        seed=seed,
    ).settled(checkpoint.config)
    check_reachable(checkpoint, options)
    _check_new(outputs, checkpoint, dtype, overwrite)
    sources = [Source.parse(text) for text in calibration]
    blocks = read_blocks(sources, checkpoint.tokenizer, tokens, block_size, text_field)
    job = Job(
        {"ir-convert": __version__, "model": checkpoint.weights_sha256}
        | {f"--{name.replace('_', '-')}": value for name, value in options.as_dict().items()}
        | {"--tokens": tokens, "--block-size": block_size, "--calibration text": blocks.sha256}
        | {"--device": target.type, "--dtype": dtype, "number of processes": team.size}
    )
    done = [output for output in outputs if job.did(output)]
    if len(done) == len(outputs) and not restart:
        report.note(f"Already done: {', '.join(str(output.path) for output in outputs)} came from this very command.")
        return Conversion(Routing.load(outputs[0].routing_file), {}, time.monotonic() - start)
    left = [output for output in outputs if restart or output not in done]
    check_outputs(left, checkpoint, overwrite, lambda output: _estimate(output, checkpoint, dtype))

    work = job.work(outputs[0], restart, team)
    learned = _calibrate(checkpoint, blocks, options, job, target, work, team, report)
    sizes = {}
    if team.rank == 0:
        sizes = _write(left, checkpoint, learned, dtype, overwrite, report)
        job.work(outputs[0], False, Team(alone=True)).clear()
    team.wait()
    return Conversion(learned, sizes, time.monotonic() - start)


def _calibrate(
    checkpoint: Checkpoint,
    blocks: Blocks,
    options: Options,
    job: Job,
    device: torch.device,
    work: Work,
    team: Team,
    report: Reporter,
) -> Routing:
    """Calibrates, or takes what an earlier run of this job had calibrated before it was interrupted."""
    kept = work.folder / "calibrated.safetensors" if work.folder else None
    if kept and team.agree(kept.is_file()):
        report.note("The calibration was finished before; only the outputs were not.")
        return Routing.load(kept)
    if work.begun:
        report.note(f"Going on with the interrupted run in {work.folder}.")
    report.note(estimate(checkpoint, blocks, options, device, team.size).sentence())
    routing = calibrate(checkpoint, blocks, options, device=device, report=report, work=work, team=team)
    routing.metadata["job_sha256"] = job.sha256
    if kept:
        routing.save(kept)
    team.wait()  # or the first process would remove the folder while another still writes there
    return routing


def _write(
    outputs: Sequence[Output],
    checkpoint: Checkpoint,
    routing: Routing,
    dtype: str,
    overwrite: bool,
    report: Reporter,
) -> dict[Path, int]:
    check_outputs(list(outputs), checkpoint, overwrite, lambda output: _estimate(output, checkpoint, dtype))
    sizes = {}
    for output in outputs:
        layers = checkpoint.config.num_hidden_layers
        with report.stage(f"write {output.path.name}", layers) as advance:
            sizes[output.path] = output.write(partial(_fill, output, checkpoint, routing, dtype, advance))
    return sizes


def _check_new(outputs: Sequence[Output], checkpoint: Checkpoint, dtype: str, overwrite: bool) -> None:
    """Refuses bad outputs before text is read; those that exist may turn out to be this very job's, so they wait."""
    new = [output for output in outputs if not output.routing_file.is_file()]
    check_outputs(new, checkpoint, overwrite, lambda output: _estimate(output, checkpoint, dtype))


def _check_dtype(outputs: Sequence[Output], dtype: str) -> None:
    if dtype == "bfloat16" and any(output.kind == "onnx" for output in outputs):
        raise UserError(
            "ONNX Runtime runs no bfloat16 model on CPUs: give --dtype float32 or float16 for an .onnx output"
        )


def _fill(
    output: Output, checkpoint: Checkpoint, routing: Routing, dtype: str, advance: Callable[[], None], folder: Path
) -> None:
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        while shown < checkpoint.config.num_hidden_layers * done // total:
            shown += 1
            advance()

    if output.kind == "routing":
        routing.save(folder / output.path.name)
    elif output.kind == "onnx":
        precision = _dtype(dtype) or torch.float32
        onnx.write(checkpoint, routing, folder, output.path.name, precision, progress)
    else:
        hf.write(checkpoint, routing, folder, _dtype(dtype), progress)


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

"""The whole pipeline, top to bottom."""

import inspect
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage

import torch
from safetensors import SafetensorError

from . import __version__
from .calibrate import Options, calibrate
from .calibrate.calibrate import check_reachable
from .calibrate.estimate import estimate
from .checkpoint import Checkpoint
from .choices import LOGITS
from .data import Blocks, Source, read_blocks
from .errors import UserError, one_line
from .families import UNITS
from .files import expanded, size_text
from .job import Job
from .lock import alone
from .outputs import Output, check_apart
from .progress import Reporter, Silent
from .quantisation import Quantisation
from .reuse import flag, require_no_calibration, reuse
from .routing import Routing
from .stream import Team, Work
from .writing import Writing

FAR = 0.02  # from what was asked; further is said


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
    target: str = "hf",
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
    gradient_checkpointing: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    int4: bool = False,
    int4_method: str | None = None,
    calibrate_quantised: bool = False,
    trace: bool = False,
    logits: str = "all",
    overwrite: bool = False,
    restart: bool = False,
    report: Reporter | None = None,
) -> Conversion:
    """Converts a pretrained decoder-only language model into a routed one.

    An interrupted conversion leaves a folder ``.NAME.work`` beside its first output; the same call goes on there.

    Args:
        model: a local folder or a Hub id.
        out: outputs; ``*.onnx`` writes an ONNX model, ``*.safetensors`` the routing file, another name a folder.
        target: what a folder holds: ``hf``, a checkpoint, or ``triton``, a model for Triton's model repository.
        sparsity: share of the decoder layers' FLOPs to save, in [0, 1); None for 0.4, or what ``routing`` was made for.
        calibration: text like what the model will serve: files, folders or data sets, each with ``=weight`` if wanted; none
            for Python's documentation topics.
        text_field: where JSON lines, Parquet files and data sets keep their text.
        tokens: calibration tokens, at most.
        block_size: tokens that are seen together.
        routing: a routing file of an earlier conversion; it takes calibration's place.
        recipe, polish, lora, steps, units, rank, router_width, kv_cache, seed, gradient_checkpointing: see
            ``calibrate.Options``.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` (float32 in ONNX, the base model's in a checkpoint), ``float32``, ``float16`` or ``bfloat16``.
        int4: quantise the units' projections of ONNX files, and their head to int8; in float32 also forecasters and routers.
        int4_method: see ``Int4``; None for ``rtn``, or what ``routing`` was calibrated on.
        calibrate_quantised: calibrate on the units as quantising leaves them.
        trace: ONNX files say with every call which tokens each unit executed.
        logits: of ``all`` tokens, or of each text's ``last``: what ONNX files give.
        overwrite: replace outputs that exist.
        restart: forget an interrupted run's work.
        report: shows progress.

    Raises:
        UserError: one line that says what is wrong; the output that it names has not been touched then.
    """
    given = dict(locals())
    start, processor = time.monotonic(), _device(device)
    if logits not in LOGITS:
        raise UserError(f"--logits '{logits}' is not known: give {' or '.join(LOGITS)}")
    outputs = _outputs(out, target)
    quantisation = Quantisation(int4, int4_method, calibrate_quantised)
    quantisation.check(outputs, routing)
    writing = Writing(outputs, dtype, quantisation, trace, logits, overwrite)
    writing.check_flags()
    if routing is not None:
        routing = expanded(routing)
        defaults = {name: argument.default for name, argument in inspect.signature(convert).parameters.items()}
        require_no_calibration(routing, given, defaults)
    team = Team.assemble(processor)
    processor = team.device(processor)
    report = report if report and team.rank == 0 else Silent()
    checkpoint = Checkpoint.open(model)
    if routing is not None:
        learned = reuse(routing, checkpoint, sparsity, report)
        writing = replace(writing, quantisation=quantisation.of(learned))
        sizes = {}
        if team.rank == 0:
            writing.check(checkpoint)
            with alone(outputs):
                sizes = writing.write(checkpoint, learned, report)
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
        gradient_checkpointing=gradient_checkpointing,
    ).settled(checkpoint.config)
    check_reachable(checkpoint, options)
    writing.check_dtype()
    check_apart(outputs, checkpoint)
    # Those that exist may turn out to be this very job's, so they wait.
    writing.only([output for output in outputs if not output.routing_file.is_file()]).check(checkpoint)
    sources = [Source.parse(text) for text in calibration]
    blocks = read_blocks(sources, checkpoint.tokenizer, tokens, block_size, text_field)
    job = Job(
        {
            "ir-convert": __version__,
            "model": checkpoint.weights_sha256,
            "config.json": checkpoint.sha256(["config.json"]),
        }
        | {flag(name): value for name, value in options.as_dict().items()}
        | {"--tokens": tokens, "--block-size": block_size, "--calibration text": blocks.sha256}
        | {"vocabulary": sha256(checkpoint.vocabulary.numpy().tobytes()).hexdigest()}
        | {"--device": processor.type, "number of processes": team.size}
        | quantisation.calibrated(),
        {"--dtype": dtype, "--trace": trace, "--logits": logits, "copied": checkpoint.sha256(checkpoint.copied)}
        | quantisation.stored(),
    )
    done = [] if restart else [output for output in outputs if job.did(output, checkpoint)]
    known = Routing.load(done[0].routing_file) if done else None
    if known and len(done) == len(outputs):
        job.forget(outputs[0], team)
        report.note(f"Already done: {', '.join(str(output.path) for output in outputs)} came from this very command.")
        return Conversion(known, {}, time.monotonic() - start)
    if known:
        report.note(f"The calibration is that of {done[0].path}, which came from this very command.")
    writing = writing.only([output for output in outputs if output not in done])
    writing.check(checkpoint)

    same = "the same command" + (", without --restart," if restart else "")
    # The work folder is beside the first output, whether or not that is still to be written.
    with alone([outputs[0], *writing.outputs]) if team.rank == 0 else nullcontext():
        try:
            work = job.work(outputs[0], restart, team)
            view = quantisation.view(checkpoint, work.folder)
            learned = known or _calibrate(view, blocks, options, job, processor, work, team, report)
        except (RuntimeError, MemoryError) as error:
            if not _lacks_memory(error):
                raise
            raise UserError(
                f"{processor} has no memory left. What was finished is kept: free some, and run {same} again. "
                "End-to-end stages hold the whole model: --gradient-checkpointing takes less for all else, and accelerate launch "
                "--use_fsdp shares the model among GPUs"
            ) from error
        except (OSError, SafetensorError) as error:  # no room, no permission
            raise UserError(
                f"the calibration had to stop: {one_line(error)}. What was finished is kept in {job.folder(outputs[0])}: put "
                f"that right, and run {same} again"
            ) from error
        sizes = {}
        if team.rank == 0:
            sizes = writing.write(checkpoint, learned, report)
            job.clear(outputs[0])
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
        routing = Routing.load(kept)
    else:
        if work.begun:
            report.note(f"Going on with the interrupted run in {work.folder}.")
        positions, length = getattr(checkpoint.config, "max_position_embeddings", None), blocks.fit.shape[1]
        if positions and length > positions:
            report.note(
                f"{checkpoint.name} knows {positions} positions, blocks have {length}: give --block-size {positions}."
            )
        for line in blocks.shortfalls():
            report.note(line)
        expected = estimate(checkpoint, blocks, options, device, team.size)
        report.note(expected.sentence())
        if work.folder and not work.begun and (free := disk_usage(work.folder).free) < expected.disk * team.size:
            report.note(f"{work.folder.parent} has {size_text(free)} free: that may be too little.")
        routing = calibrate(checkpoint, blocks, options, device=device, report=report, work=work, team=team)
        achieved = routing.metadata["test"]["sparsity"]
        if abs(achieved - options.sparsity) > FAR:
            why = "whole units switch" if options.router_width == 0 else "the text that set the threshold is another"
            report.note(f"{options.sparsity:.1%} was asked, {achieved:.1%} is saved on held-out text: {why}.")
        if kept:
            routing.save(kept)
    routing.metadata["job_sha256"] = job.sha256  # set here: how it is written may have changed since
    team.wait()  # or the first process would remove the folder while another still writes there
    return routing


def _lacks_memory(error: Exception) -> bool:
    """Tells whether there was no memory: torch has an exception for that on GPUs alone."""
    said = str(error)
    lacks = "can't allocate memory" in said or "not enough memory" in said
    return lacks or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _outputs(paths: Sequence[Path], target: str) -> list[Output]:
    outputs = [Output.parse(path, target) for path in paths]
    if target == "triton" and not any(output.kind == target for output in outputs):
        raise UserError("--target triton wants a folder of the model repository, e.g. --out model_repository/ir-llama")
    return outputs


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        place = device
        if device.type == "cuda" and device.index is None:  # one of several processes opens its own GPU alone
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))
        torch.zeros(1, dtype=torch.float64, device=place).item()  # "meta" has no values, "mps" no float64
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise UserError(f"device '{name}' cannot be used here: try --device cpu") from error
    return device

"""Writes the outputs of a conversion, each whole or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .errors import UserError
from .export import hf, onnx
from .export.onnx import genai, triton
from .outputs import Output, check_outputs
from .progress import Reporter
from .quantisation import Quantisation, onnx_bytes
from .routing import Routing


@dataclass(frozen=True)
class Writing:
    """What is to be written, and how.

    Attributes:
        outputs: where.
        dtype: ``auto``, or the name of a precision.
        quantisation: the int4 flags.
        trace: ONNX files say with every call which tokens each unit executed.
        logits: of ``all`` tokens, or of each text's ``last``: what ONNX files give.
        overwrite: replace outputs that exist.
    """

    outputs: Sequence[Output]
    dtype: str
    quantisation: Quantisation
    trace: bool
    logits: str
    overwrite: bool

    def only(self, outputs: Sequence[Output]) -> "Writing":
        """Returns the same for other outputs."""
        return replace(self, outputs=outputs)

    def check_flags(self) -> None:
        """Raises UserError where a flag is of outputs of another kind."""
        if (self.trace or self.logits != "all") and not self._has_onnx:
            flag = "--trace" if self.trace else f"--logits {self.logits}"
            raise UserError(f"{flag} is of ONNX files, and no output is one: name a .onnx output, or leave it out")
        if self.dtype != "auto" and all(output.kind == "routing" for output in self.outputs):
            raise UserError(
                f"--dtype {self.dtype} is of models, and a routing file alone is to be written: leave it out"
            )

    def check_dtype(self) -> None:
        """Raises UserError where a runtime that is asked for takes no model of this precision."""
        if self._has_onnx:
            onnx.check_dtype(self._dtype or torch.float32)
        if self._dtype == torch.bfloat16 and any(output.kind == "triton" for output in self.outputs):
            raise UserError("Triton's ONNX Runtime backend takes no bfloat16: give --dtype float16 or float32")

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises UserError where an output exists, has no room, or cannot hold this model."""
        # What is calibrated on quantised units is for an ONNX file to come.
        if self._has_onnx or self.quantisation.calibrate:
            onnx.check_model(checkpoint.config, self.quantisation.seen)
            genai.settings(checkpoint, "")
        check_outputs(list(self.outputs), checkpoint, self.overwrite, lambda output: self._estimate(output, checkpoint))

    def write(self, checkpoint: Checkpoint, routing: Routing, report: Reporter) -> dict[Path, int]:
        """Writes all outputs, and returns the bytes that each takes.

        Raises:
            UserError: one line that says what is wrong; that output has not been touched then.
        """
        self.check_dtype()
        self.check(checkpoint)
        for line in self.quantisation.warnings(routing, self.outputs):
            report.note(line)
        if self._dtype == torch.bfloat16 and self._has_onnx:
            report.note("ONNX Runtime runs bfloat16 models on GPUs alone: CPUs need float32 or float16.")
        sizes = {}
        for output in self.outputs:
            layers = checkpoint.config.num_hidden_layers
            with report.stage(f"write {output.path.name}", layers) as advance:
                sizes[output.path] = output.write(partial(self._fill, output, checkpoint, routing, advance))
        return sizes

    @property
    def _has_onnx(self) -> bool:
        return any(output.is_onnx for output in self.outputs)

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def _fill(
        self, output: Output, checkpoint: Checkpoint, routing: Routing, advance: Callable[[], None], folder: Path
    ) -> None:
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            while shown < checkpoint.config.num_hidden_layers * done // total:
                shown += 1
                advance()

        if output.kind == "routing":
            routing.save(folder / output.path.name)
            progress(1, 1)
        elif output.is_onnx:
            model = folder / output.model_file
            model.parent.mkdir(exist_ok=True)
            onnx.write(
                checkpoint,
                routing,
                model.parent,
                model.name,
                self._dtype or torch.float32,
                progress,
                int4=self.quantisation.written,
                trace=self.trace,
                logits=self.logits,
            )
            if output.kind == "triton":
                triton.write(folder, output.model_file)
        else:
            hf.write(checkpoint, routing, folder, self._dtype, progress)

    def _estimate(self, output: Output, checkpoint: Checkpoint) -> int:
        """Returns the bytes that an output takes, routing included (about 2 % of the weights, generously)."""
        if output.kind == "routing":
            return checkpoint.weight_bytes // 20
        if output.is_onnx:
            return int(onnx_bytes(checkpoint, self._dtype or torch.float32, self.quantisation.written) * 1.05)
        stored = checkpoint.stored_dtype
        return int(checkpoint.weight_bytes * (self._dtype or stored).itemsize / stored.itemsize * 1.05)

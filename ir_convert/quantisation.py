"""What the int4 flags ask for: how ONNX files are quantised, and whether the calibration runs on quantised units."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .checkpoint import Checkpoint
from .errors import UserError
from .export.onnx.int4 import Int4, quantise
from .export.onnx.int4_methods import Packed
from .export.onnx.int8 import BLOCK
from .families import layer_matrices
from .files import sync
from .outputs import Output
from .routing import Routing


@dataclass(frozen=True)
class Quantisation:
    """The flags, checked against each other.

    Attributes:
        int4: whether ONNX files are quantised.
        method: ``--int4-method``; None where the user leaves it open.
        calibrate: whether the calibration runs on quantised units.
    """

    int4: bool = False
    method: str | None = None
    calibrate: bool = False

    def check(self, outputs: Sequence[Output], routing: Path | None) -> None:
        """Checks that the flags make sense together, and for what is written.

        Raises:
            UserError: they do not.
        """
        Int4(self.method or Int4.method)
        if self.method and not (self.int4 or self.calibrate):
            raise UserError(f"--int4-method {self.method} quantises nothing by itself: give --int4 as well")
        if self.int4 and not any(output.is_onnx for output in outputs):
            raise UserError(
                "--int4 is of ONNX files, and no output is one: name a .onnx output, or give --calibrate-quantised in its "
                "place to calibrate for one"
            )
        if self.calibrate and routing is not None:
            raise UserError("--calibrate-quantised is of a calibration, whose place --routing takes: give one of them")
        if self.calibrate and not self.int4 and (full := [o.path for o in outputs if o.kind != "routing"]):
            raise UserError(
                f"--calibrate-quantised is for int4 units, and those of {full[0]} will not be: give --int4 for an .onnx "
                "output, or write a routing file (.safetensors) alone"
            )

    @property
    def setting(self) -> Int4:
        return Int4(self.method or Int4.method)

    @property
    def seen(self) -> Int4 | None:
        """How units are quantised, in ONNX files or for the calibration alone."""
        return self.setting if self.int4 or self.calibrate else None

    @property
    def written(self) -> Int4 | None:
        """How ONNX files are quantised."""
        return self.setting if self.int4 else None

    def calibrated(self) -> dict[str, Any]:
        """Returns what the calibration sees of the flags, by their names."""
        method = {"--int4-method": self.setting.method} if self.calibrate else {}
        return method | {"--calibrate-quantised": self.calibrate}

    def stored(self) -> dict[str, Any]:
        """Returns what the files see of them."""
        return {"--int4": self.int4} | ({"--int4-method": self.setting.method} if self.int4 else {})

    def view(self, checkpoint: Checkpoint, folder: Path | None) -> Checkpoint:
        """Returns what the calibration runs on; quantised weights are kept in a part of its work folder."""
        if not self.calibrate:
            return checkpoint
        return checkpoint.quantised(Int4Rounding(self.setting, folder / "int4" if folder else None))

    def of(self, routing: Routing) -> "Quantisation":
        """Returns the flags with the method left open taken from the routing file, if that was calibrated on one."""
        facts = routing.quantised_units
        return replace(self, method=facts["method"]) if facts and self.int4 and self.method is None else self

    def warnings(self, routing: Routing, outputs: Sequence[Output]) -> list[str]:
        """Returns a line for every output whose units are not as those that the routing was calibrated on."""

        def said(facts: dict[str, Any] | None) -> str:
            return f"int4 units ({facts['method']})" if facts else "unquantised units"

        calibrated = routing.quantised_units
        lines = []
        for output in outputs:
            written = self.written.facts() if self.written and output.is_onnx else None
            if output.kind != "routing" and written != calibrated:
                advice = " --calibrate-quantised calibrates on what is written." if written else ""
                lines.append(
                    f"{output.path} gets {said(written)}, and the routing was calibrated on {said(calibrated)}: it may lose "
                    f"more, and save another share, than the table says.{advice}"
                )
        return lines


def onnx_bytes(checkpoint: Checkpoint, dtype: torch.dtype, int4: Int4 | None) -> int:
    """Returns about how many bytes the weights of an ONNX file take."""
    weights = checkpoint.weight_bytes // checkpoint.stored_dtype.itemsize
    if int4 is None:
        return weights * dtype.itemsize
    sizes, layers = layer_matrices(checkpoint.config), checkpoint.config.num_hidden_layers
    head = checkpoint.config.vocab_size * checkpoint.config.hidden_size
    # A head of its own goes over to int8; a tied one becomes a copy in int8.
    projections = layers * sum(count * inputs * outputs for inputs, outputs, count in sizes)
    projections += 0 if checkpoint.tied else head
    packed = layers * sum(count * int4.size(outputs, inputs, dtype.itemsize) for inputs, outputs, count in sizes)
    packed += checkpoint.config.vocab_size * -(-checkpoint.config.hidden_size // BLOCK) * (BLOCK + dtype.itemsize)
    return max(0, weights - projections) * dtype.itemsize + packed


@dataclass(frozen=True)
class Int4Rounding:
    """A checkpoint's ``Rounding`` to int4.

    A calibration reads every weight dozens of times, and quantising takes longer than reading: quantised weights are kept.

    Attributes:
        int4: how to quantise.
        folder: where to keep quantised weights, about 5 bits a weight; None to quantise each time.
    """

    int4: Int4
    folder: Path | None = None

    def __call__(self, weight: torch.Tensor, name: str | None) -> torch.Tensor:
        if self.folder is None or name is None:
            return quantise(weight, self.int4, name or "a weight").dequantised()
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            save_file(quantise(weight, self.int4, name).parts(), temporary)
            sync(temporary)
            temporary.replace(file)
        parts = load_file(file)
        return Packed(parts["weight"], parts["scales"], parts.get("zero_points"), weight.shape[1]).dequantised()

    def facts(self) -> dict[str, Any]:
        return self.int4.facts()

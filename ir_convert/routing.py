"""The routing file: everything that calibration learns, and all that an exporter needs beside the base weights.

A safetensors file. Tensors: ``layers.{i}.{attention|mlp}.{forecaster|router}.*`` (see ``units.py``; units without any always
run), ``curve.sparsity`` and ``curve.threshold``; ``lora.{weight}.a`` and ``.b`` where base weights were adapted (W + B A).
Metadata ``ir_convert`` (JSON): base model and hash of its weights, recipe, options, data, figures.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import Lora
from .curve import Curve
from .errors import UserError, one_line
from .files import require_readable, sync
from .units import Units, units_from_tensors, units_to_tensors

FORMAT = 2

__all__ = ["Curve", "Routing", "Units"]


@dataclass
class Routing:
    """A calibrated routing.

    Attributes:
        units: forecaster and router by (layer, unit), fp32; units that are missing always execute.
        curve: sparsity -> threshold.
        metadata: JSON-able facts: ``base_model``, ``weights_sha256``, ``recipe``, ``kv_cache``, ``sparsity`` (asked),
            ``threshold`` ... see ``calibrate``.
        lora: low-rank changes of base weights by tensor name: A ``[rank, in]`` and B ``[out, rank]``, folded as W + B A.
    """

    units: Units
    curve: Curve
    metadata: dict[str, Any] = field(default_factory=dict)
    lora: Lora = field(default_factory=dict)

    @property
    def kv_cache(self) -> str:
        """``full``: keys and values are kept for every token. ``strict``: approximated tokens leave none."""
        return self.metadata.get("kv_cache", "full")

    @property
    def quantised_units(self) -> dict[str, Any] | None:
        """How the units were quantised that it was calibrated on (bits, block, method); None where they were not."""
        return self.metadata.get("quantised_units")

    @property
    def sparsity(self) -> float:
        """The sparsity that was asked for, the default of every artifact."""
        return self.metadata["sparsity"]

    @property
    def measured(self) -> bool:
        """Whether the metadata hold figures on held-out text, as all that a calibration gives do."""
        return "test" in self.metadata

    @property
    def moved_from(self) -> float | None:
        """The sparsity that the figures in the metadata are of, where the dial was moved afterwards; None where it was not."""
        asked = self.metadata["test"]["asked"] if self.measured else self.sparsity
        return asked if asked != self.sparsity else None

    @property
    def threshold(self) -> float:
        """The threshold of ``sparsity``."""
        return self.curve.at(self.sparsity)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all (temporary file, fsync, rename)."""
        tensors = {
            f"layers.{name}": tensor.detach().float().cpu().contiguous()
            for name, tensor in units_to_tensors(self.units).items()
        }
        for weight, (a, b) in self.lora.items():
            tensors |= {f"lora.{weight}.a": a.float().contiguous(), f"lora.{weight}.b": b.float().contiguous()}
        tensors["curve.sparsity"] = torch.tensor(self.curve.sparsity, dtype=torch.float64)
        tensors["curve.threshold"] = torch.tensor(self.curve.threshold, dtype=torch.float64)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"format": str(FORMAT), "ir_convert": json.dumps(self.metadata)})
        sync(temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Routing":
        """Reads a routing file.

        Raises:
            UserError: the file is missing, damaged, or not a routing file of a known format.
        """
        require_readable(path)
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != str(FORMAT) or "ir_convert" not in header:
                    raise UserError(
                        f"{path} is not a routing file of format {FORMAT}: name one that this version of ir-convert wrote"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            why = "it is a folder" if path.is_dir() else error
            raise UserError(f"cannot read the routing file {path}: {why}") from error
        try:
            return cls._of(tensors, json.loads(header["ir_convert"]))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"the routing file {path} is damaged ({one_line(error)}): calibrate again") from error

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> "Routing":
        curve = Curve(*(tensors.pop(f"curve.{axis}").tolist() for axis in ("sparsity", "threshold")))
        lora = {
            name.removeprefix("lora.").removesuffix(".a"): (tensors.pop(name), tensors.pop(name[:-1] + "b"))
            for name in sorted(tensors)
            if name.startswith("lora.") and name.endswith(".a")
        }
        units = units_from_tensors({name.removeprefix("layers."): tensor for name, tensor in tensors.items()})
        for (layer, unit), routed in units.items():
            if not routed.fits_together():
                raise ValueError(f"layer {layer}, {unit}: sizes that do not belong together")
        return cls(units, curve, metadata, lora)

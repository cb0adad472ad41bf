"""A plain torch rendering of the method, and padded batches to hold an exported model against it."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_convert.families import family_of
from ir_convert.routing import Routing
from ir_convert.runtime import OnnxModel
from ir_convert.units import merge

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MoE")


@dataclass
class Reference:
    """Computes every unit for every token in transformers' model, then picks: what the unit adds to the stream where score >
    threshold, forecast(h) elsewhere.
    """

    model: nn.Module
    routing: Routing
    decisions: dict[tuple[int, str], Tensor]
    margin: float = np.inf
    scores: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def __call__(self, ids: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """Returns the logits; leaves the decisions, the scores, and the smallest distance of a score from the threshold."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.margin = np.inf
        with self._routed(mask.bool(), threshold), torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    @contextmanager
    def _routed(self, real: Tensor, threshold: float) -> Iterator[None]:
        hooks: list[Any] = []
        for key in self.routing.units:
            hooks += self._route(key, real, threshold)
        yield
        for hook_handle in hooks:
            hook_handle.remove()

    def _route(self, key: tuple[int, str], real: Tensor, threshold: float) -> list[Any]:
        """Hooks on the unit, whose input tells h, and on the last module of what it adds, whose output is replaced."""
        layer, place = self.model.model.layers[key[0]], family_of(self.model.config).unit(key[1])
        unit, last = getattr(layer, place.module), getattr(layer, place.post_norm or place.module)
        multiplier = getattr(self.model.config, "residual_multiplier", 1.0)  # the layer's own code applies it
        routed, forecasts = self.routing.units[key], []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen = args[0] if args else kwargs["hidden_states"]
            h = (
                seen
                if place.norm
                else nn.functional.rms_norm(seen, seen.shape[-1:], eps=self.model.config.rms_norm_eps)
            )
            self.scores[key] = routed.router(h)
            self.margin = min(self.margin, (self.scores[key] - threshold)[real].abs().min().item())
            self.decisions[key] = routed.execute(h, threshold) & real
            forecasts.append(routed.forecaster(h))

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            added = output[0] if isinstance(output, tuple) else output
            merged = merge(self.decisions[key], added, forecasts.pop() / multiplier)
            return (merged, *output[1:]) if isinstance(output, tuple) else merged

        return [unit.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]


@dataclass
class Batch:
    """Padded texts.

    Attributes:
        ids, mask: ``[B, S]``.
        pieces: lengths that add up to S, for a prompt fed piece by piece.
    """

    ids: Tensor
    mask: Tensor
    pieces: list[int]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    mask = torch.ones(batch, length, dtype=torch.long)
    left = draw(st.booleans())
    for row in range(batch):
        padding = draw(st.integers(0, length - 1))
        mask[row, slice(0, padding) if left else slice(length - padding, None)] = 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.randint(3, 131, (batch, length), generator=generator)
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
    pieces = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return Batch(ids, mask, pieces)


def profile(model: OnnxModel, batch: Batch, thresholds: Sequence[float], folder: Path) -> list[list[dict[str, Any]]]:
    """Returns every node that ONNX Runtime ran at each threshold, by its own profile."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    profiled = OnnxModel.load(model.path, ["CPUExecutionProvider"], threads=1, options=options)
    for profiled.threshold in thresholds:
        run_pieces(profiled, batch)
    with open(profiled.session.end_profiling()) as file:
        events = json.load(file)
    begun = sorted(event["ts"] for event in events if event["name"] == "model_run")[:: len(batch.pieces)]
    assert len(begun) == len(thresholds)
    return [
        [event for event in events if "op_name" in event.get("args", {}) and start <= event["ts"] < end]
        for start, end in zip(begun, [*begun[1:], math.inf], strict=True)
    ]


def product_shapes(model: OnnxModel, batch: Batch, thresholds: Sequence[float], folder: Path) -> list[list[list[int]]]:
    """Returns the output shape of every matrix product that ONNX Runtime ran inside the routed units, at each threshold.

    One that is followed by a factor runs as FusedMatMul.
    """
    return [
        [
            shape
            for event in ran
            if event["args"]["op_name"] in PRODUCTS
            and "_inlfunc_" in event["name"]
            and "_inlfunc_Decide" not in event["name"]
            for shape in event["args"]["output_type_shape"][0].values()
        ]
        for ran in profile(model, batch, thresholds, folder)
    ]


def run_pieces(model: OnnxModel, batch: Batch) -> Tensor:
    """Feeds a batch piece by piece, and returns all logits."""
    logits, cache, end = [], None, 0
    for piece in batch.pieces:
        start, end = end, end + piece
        piece_logits, cache = model.forward(batch.ids[:, start:end], batch.mask[:, :end], past=cache)
        logits.append(torch.from_numpy(piece_logits))
    return torch.cat(logits, 1)

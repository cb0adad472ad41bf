"""One unit at a time: random inputs, a float64 rendering of what it computes, and models that hold nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from ir_convert.export.onnx import functions
from ir_convert.export.onnx.body import Features
from ir_convert.export.onnx.functions import DOMAIN, OPSETS, VERSION

TYPES = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.float16): ir.DataType.FLOAT16}
TYPES |= {np.dtype(np.bool_): ir.DataType.BOOL, np.dtype(np.int32): ir.DataType.INT32}
# How far from float64 a result may be, as a share of the largest value.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}


@dataclass(frozen=True)
class Unit:
    """A call of a function.

    Attributes:
        function: the function's name.
        inputs: by name; what is absent is left out.
        attributes: by name.
    """

    function: str
    inputs: Mapping[str, NDArray]
    attributes: Mapping[str, Any]

    @property
    def dtype(self) -> np.dtype:
        return self.inputs["h"].dtype

    @cached_property
    def definition(self) -> ir.Function:
        optional = [name for name in self.inputs if name.endswith(("_bias", "_norm")) and name != "step_bias"]
        dtype, routed = TYPES[self.dtype], "execute" in self.inputs
        scaled = self.attributes["residual_multiplier"] != 1
        if self.function.endswith("MLP"):
            features = Features(self.attributes["activation"], scaled=scaled)
            return functions.mlp(optional, routed, dtype, features=features)
        norm = self.inputs.get("q_norm", self.inputs.get("k_norm"))
        features = Features(whole_norms=norm is not None and len(norm) != self.attributes["head_dim"], scaled=scaled)
        kv_cache = "strict" if self.function.endswith("Strict") else "full"
        return functions.attention(optional, routed, kv_cache, dtype, features=features)

    def model(self, constant: bool = False, dtype: ir.DataType | None = None) -> bytes:
        """Returns a model of one node, and the function's body.

        Args:
            constant: makes the weights part of the model, where they are inputs otherwise.
            dtype: of all floats, if not the inputs' own; for a model that is not run.
        """
        graph = ir.Graph([], [], nodes=[], opset_imports={**OPSETS, DOMAIN: VERSION}, name="call")
        builder = GraphBuilder(graph)
        values = {}
        for name, array in self.inputs.items():
            kind = dtype if dtype is not None and array.dtype == self.dtype else TYPES[array.dtype]
            if constant and name.endswith(("_weight", "_bias", "_norm")) and name != "step_bias":
                values[name] = builder.initializer(ir.tensor(array, name=name), name)
            else:
                values[name] = builder.input(name, kind, [None] * array.ndim)
        outputs = [
            ir.Value(name=value.name, type=ir.TensorType(dtype or TYPES[self.dtype]))
            for value in self.definition.outputs
        ]
        arguments = [values.get(str(value.name)) for value in self.definition.inputs]
        builder.call(self.definition, *arguments, _outputs=outputs, **self.attributes)
        graph.outputs.extend(outputs)
        model = ir.Model(graph, ir_version=11, functions=[self.definition])
        return ir.serde.serialize_model(model).SerializeToString()

    def run(self, library: Path | None, constant: bool = False, threads: int = 1) -> list[NDArray]:
        """Runs it in ONNX Runtime, every output full of NaN before; a past with room is bound as present too."""
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(self.model(constant), options, providers=["CPUExecutionProvider"])
        binding, given = session.io_binding(), {value.name for value in session.get_inputs()}
        buffers = {name: ort.OrtValue.ortvalue_from_numpy(x.copy()) for name, x in self.inputs.items() if name in given}
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        outputs = []
        for value, name in zip(session.get_outputs(), ("output", "past_key", "past_value"), strict=False):
            if name == "output":
                buffer = _poisoned(self.inputs["h"].shape, self.dtype)
            elif self.in_place:
                buffer = buffers[name]
            else:
                batch, heads, _, width = self.inputs[name].shape
                buffer = _poisoned((batch, heads, self.total, width), self.dtype)
            binding.bind_ortvalue_output(value.name, buffer)
            outputs.append(buffer)
        session.run_with_iobinding(binding)
        return [output.numpy().copy() for output in outputs]

    @property
    def total(self) -> int:
        return self.inputs["mask"].shape[2]

    @property
    def in_place(self) -> bool:
        return "mask" in self.inputs and self.inputs["past_key"].shape[2] >= self.total

    def expected(self) -> list[NDArray]:
        """Returns the outputs, float64; of caches the slots in use."""
        wide = {name: x.astype(np.float64) if x.dtype == self.dtype else x for name, x in self.inputs.items()}
        unit = replace(self, inputs=wide)
        return [unit._contributed(unit._mlp())] if self.function.endswith("MLP") else unit._attention()

    def check(self, got: list[NDArray]) -> None:
        """Raises AssertionError unless these outputs are right."""
        for result, wanted in zip(got, self.expected(), strict=True):
            if result.ndim == 4:
                result, unused = np.split(result, [self.total], axis=2)
                assert np.isnan(unused).all()  # nothing is written there
            assert result.dtype == self.dtype
            error = np.abs(result - wanted).max(initial=0) / np.abs(wanted).max(initial=1e-3)
            assert error <= TOLERANCE[self.dtype], (self.function, error)  # NaN is not

    def _linear(self, h: NDArray, name: str) -> NDArray:
        return h @ self.inputs[f"{name}_weight"] + self.inputs.get(f"{name}_bias", 0)

    def _norm(self, y: NDArray, weight: NDArray) -> NDArray:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + self.attributes["epsilon"]) * weight

    def _contributed(self, y: NDArray) -> NDArray:
        if (norm := self.inputs.get("post_norm")) is not None:
            y = self._norm(y, norm)
        y = y * self.attributes["residual_multiplier"]
        execute = self.inputs.get("execute")
        return y if execute is None else np.where(execute[..., None], y, self.inputs["forecast"])

    def _mlp(self) -> NDArray:
        gate, up = self._linear(self.inputs["h"], "gate"), self._linear(self.inputs["h"], "up")
        if self.attributes["activation"] == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return self._linear(gate * up, "down")

    def _attention(self) -> list[NDArray]:
        x, attributes = self.inputs, self.attributes
        heads, kv_heads, width = attributes["num_heads"], attributes["kv_num_heads"], attributes["head_dim"]
        batch, length, _ = x["h"].shape
        start = self.total - length
        strict = self.function.endswith("Strict")
        written = x["execute"] if strict else np.ones((batch, length), bool)

        def project(name: str, count: int, rotate: bool) -> NDArray:
            y, norm = self._linear(x["h"], name), x.get(f"{name}_norm")
            if norm is not None and len(norm) != width:
                y = self._norm(y, norm)
            y = y.reshape(batch, length, count, width)
            if norm is not None and len(norm) == width:
                y = self._norm(y, norm)
            y = y.transpose(0, 2, 1, 3)
            if not rotate:
                return y
            cos, sin, half = x["cos"][:, None], x["sin"][:, None], x["cos"].shape[-1]
            a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

        def cached(name: str, rotate: bool) -> NDArray:
            new = project(name[0], kv_heads, rotate) * written[:, None, :, None]
            return np.concatenate([x[f"past_{name}"][:, :, :start], new], 2)

        key, value = cached("key", True), cached("value", False)
        seen = x["mask"][:, None]
        if strict:
            seen = seen & (key != 0).any((1, 3))[:, None, None]
        group = heads // kv_heads
        scores = project("q", heads, True) @ key.repeat(group, 1).transpose(0, 1, 3, 2) * attributes["scale"]
        if cap := attributes["softcap"]:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(seen, scores, -np.inf)
        # A token that does not execute may see nothing.
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        y = (weights @ value.repeat(group, 1)).transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return [self._contributed(self._linear(y, "o")), key, value]


def _poisoned(shape: tuple[int, ...], dtype: np.dtype) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, dtype))


EXECUTES = ("none", "one", "all", "random", "ragged")


def execute_mask(rng: np.random.Generator, kind: str, batch: int, length: int) -> NDArray:
    """Which tokens execute: ``ragged`` is nothing in the first sequence, everything in the last."""
    if kind == "one":
        return np.arange(batch * length).reshape(batch, length) == rng.integers(batch * length)
    share = {"none": 0.0, "all": 1.0, "random": 0.5, "ragged": np.linspace(0, 1, batch)[:, None]}[kind]
    return rng.random((batch, length)) < share


def random_mlp(
    rng: np.random.Generator,
    batch: int,
    length: int,
    width: int = 64,
    hidden: int = 96,
    execute: str | None = "random",
    optional: tuple[str, ...] = (),
    dtype: type = np.float32,
    **attributes: Any,
) -> Unit:
    """Returns a RoutedMLP, or without ``execute`` a DenseMLP."""
    weights = {"gate_weight": (width, hidden), "up_weight": (width, hidden), "down_weight": (hidden, width)}
    rows = {"gate_bias": hidden, "up_bias": hidden, "down_bias": width, "post_norm": width}
    inputs = _inputs(rng, batch, length, width, execute)
    inputs |= _weights(rng, weights, {name: rows[name] for name in optional})
    defaults = {"activation": "silu", "epsilon": 1e-5, "residual_multiplier": 1.0}
    return Unit("DenseMLP" if execute is None else "RoutedMLP", _cast(inputs, dtype), defaults | attributes)


def random_attention(
    rng: np.random.Generator,
    batch: int,
    length: int,
    past: int = 0,
    spare: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    width: int = 64,
    execute: str | None = "random",
    strict: bool = False,
    mask: str = "left",
    optional: tuple[str, ...] = (),
    whole_norms: bool = False,
    dtype: type = np.float32,
    **attributes: Any,
) -> Unit:
    """Returns an attention unit.

    Args:
        past: slots in use before the call.
        spare: None for a past that is full; or else a buffer with so much room left after the call.
        heads: of queries, and of keys and values.
        execute: see ``execute_mask``; None for DenseAttention.
        mask: what is hidden from the causal view: padding ``left`` or ``right``, all but a ``window``, or ``holes``.
    """
    total, q, kv = past + length, heads[0] * head_dim, heads[1] * head_dim
    weights = {"q_weight": (width, q), "k_weight": (width, kv), "v_weight": (width, kv), "o_weight": (q, width)}
    rows = {"q_bias": q, "k_bias": kv, "v_bias": kv, "o_bias": width, "post_norm": width}
    rows |= {"q_norm": q if whole_norms else head_dim, "k_norm": kv if whole_norms else head_dim}
    inputs = _inputs(rng, batch, length, width, execute)
    angles = rng.random((batch, length, (attributes.get("rotary_dim") or head_dim) // 2)) * 6
    inputs |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    inputs["mask"] = _mask(rng, mask, batch, length, total)
    inputs["step_bias"] = np.where(inputs["mask"][:, None, -1:], 0.0, -np.inf)
    inputs |= {"start": np.full(batch, past, np.int32), "total": np.array([total], np.int32)}
    inputs["step"] = np.array([batch == 1 and length == 1 and spare is not None])
    for part in ("past_key", "past_value"):
        cache = rng.standard_normal((batch, heads[1], past + (0 if spare is None else length + spare), head_dim))
        cache[:, :, past:] = np.nan  # nothing of what lies in unused slots may be seen
        inputs[part] = cache
    if strict:
        kept = rng.random((batch, 1, past, 1)) < 0.6
        for part in ("past_key", "past_value"):
            inputs[part][:, :, :past] *= kept
    inputs |= _weights(rng, weights, {name: rows[name] for name in optional})
    defaults = {"scale": head_dim**-0.5, "softcap": 0.0, "rotary_dim": 0, "epsilon": 1e-5, "residual_multiplier": 1.0}
    sizes = {"num_heads": heads[0], "kv_num_heads": heads[1], "head_dim": head_dim}
    name = "DenseAttention" if execute is None else "RoutedAttentionStrict" if strict else "RoutedAttention"
    return Unit(name, _cast(inputs, dtype), sizes | defaults | attributes)


def _inputs(rng: np.random.Generator, batch: int, length: int, width: int, execute: str | None) -> dict[str, NDArray]:
    inputs = {"h": rng.standard_normal((batch, length, width))}
    if execute is not None:
        inputs["forecast"] = rng.standard_normal((batch, length, width))
        inputs["execute"] = execute_mask(rng, execute, batch, length)
    return inputs


def _weights(rng: np.random.Generator, weights: dict[str, tuple[int, int]], rows: dict[str, int]) -> dict[str, NDArray]:
    drawn = {name: rng.standard_normal(shape) / shape[0] ** 0.5 for name, shape in weights.items()}
    return drawn | {name: rng.standard_normal(size) + name.endswith("_norm") for name, size in rows.items()}


def _mask(rng: np.random.Generator, kind: str, batch: int, length: int, total: int) -> NDArray:
    slots, places = np.arange(total), np.arange(total - length, total)[:, None]
    mask = np.broadcast_to(slots <= places, (batch, length, total)).copy()
    padding = rng.integers(0, total // 2 + 1, batch)[:, None, None]
    if kind == "left":
        mask &= slots >= padding
    elif kind == "right":
        mask &= slots < total - padding
    elif kind == "window":
        mask &= slots > places - max(total // 3, 1)
    else:
        mask &= rng.random(mask.shape) < 0.6
    return mask | (slots == places)  # every token sees itself


def _cast(inputs: dict[str, NDArray], dtype: type) -> dict[str, NDArray]:
    return {name: x.astype(dtype) if x.dtype == np.float64 else x for name, x in inputs.items()}

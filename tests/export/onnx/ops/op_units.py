"""One unit at a time: random inputs, a float64 rendering of what it computes, and models that hold nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder
from torch import from_numpy

from ir_convert.export.onnx import functions
from ir_convert.export.onnx.body import Features
from ir_convert.export.onnx.functions import DOMAIN, INT4_DOMAIN, OPSETS, VERSION
from ir_convert.export.onnx.int4 import Int4
from ir_convert.export.onnx.int4_methods import Packed

TYPES = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.float16): ir.DataType.FLOAT16}
TYPES |= {np.dtype(ml_dtypes.bfloat16): ir.DataType.BFLOAT16}
TYPES |= {
    np.dtype(np.bool_): ir.DataType.BOOL,
    np.dtype(np.int32): ir.DataType.INT32,
    np.dtype(np.uint8): ir.DataType.UINT8,
}
# How far from float64 a result may be, as a share of the largest value.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}
TOLERANCE[np.dtype(ml_dtypes.bfloat16)] = 1.6e-2
# In int4, root mean square as a share of the values': of float32, where one in ten thousand activations in between falls on the
# other side of a rounding to int8, and of float16, where more do. Were none rounded, it would be 5e-3.
INT4_TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 8e-3}


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
    int4: Int4 | None = None  # how the weights are quantised, if they are

    @property
    def dtype(self) -> np.dtype:
        return self.inputs["h"].dtype

    @cached_property
    def definition(self) -> ir.Function:
        optional = [name for name in self.inputs if name.endswith(functions.OPTIONAL) and name != "step_bias"]
        dtype, routed = TYPES[self.dtype], "execute" in self.inputs
        if self.function == "Decide":
            return _built(functions.decide, "down_weight" in self.inputs, dtype, self.int4)
        scaled = self.attributes["residual_multiplier"] != 1
        int4 = None
        if self.int4 is not None:
            sizes = {name: (len(self.inputs[f"{name}_weight"]), self._width_into(name)) for name in self.projections()}
            int4 = {name: self.int4.attributes(*size) for name, size in sizes.items()}
        if self.function.endswith("MLP"):
            features = Features(self.attributes["activation"], scaled=scaled)
            return _built(functions.mlp, optional, routed, dtype, int4, features)
        norm = self.inputs.get("q_norm", self.inputs.get("k_norm"))
        features = Features(whole_norms=norm is not None and len(norm) != self.attributes["head_dim"], scaled=scaled)
        kv_cache = "strict" if self.function.endswith("Strict") else "full"
        return _built(functions.attention, optional, routed, kv_cache, dtype, int4, features)

    def projections(self) -> tuple[str, ...]:
        if self.function == "Decide":
            return functions.DECIDE_PROJECTIONS
        is_mlp = self.function.endswith("MLP")
        return functions.MLP_PROJECTIONS if is_mlp else functions.ATTENTION_PROJECTIONS

    def _width_into(self, name: str) -> int:
        """Returns how many inputs an MLP's or attention's projection has."""
        if name == "o":
            return self.attributes["num_heads"] * self.attributes["head_dim"]
        return len(self.inputs["gate_weight"]) if name == "down" else self.inputs["h"].shape[-1]

    def model(self, constant: bool = False, dtype: ir.DataType | None = None) -> bytes:
        """Returns a model of one node, and the function's body.

        Args:
            constant: makes the weights part of the model, where they are inputs otherwise.
            dtype: of all floats, if not the inputs' own; for a model that is not run.
        """
        graph = ir.Graph([], [], nodes=[], opset_imports={**OPSETS, DOMAIN: VERSION, INT4_DOMAIN: VERSION}, name="call")
        builder = GraphBuilder(graph)
        values = {}
        for name, array in self.inputs.items():
            kind = dtype if dtype is not None and array.dtype == self.dtype else TYPES[array.dtype]
            if constant and name.endswith(("_weight", "_scales", *functions.OPTIONAL)) and name != "step_bias":
                values[name] = builder.initializer(ir.tensor(array, name=name), name)
            else:
                values[name] = builder.input(name, kind, [None] * array.ndim)
        kinds = {"execute": ir.DataType.BOOL, "score": ir.DataType.FLOAT}
        outputs = [
            ir.Value(name=value.name, type=ir.TensorType(kinds.get(str(value.name), dtype or TYPES[self.dtype])))
            for value in self.definition.outputs
        ]
        arguments = [values.get(str(value.name)) for value in self.definition.inputs]
        builder.call(self.definition, *arguments, _outputs=outputs, **self.attributes)
        graph.outputs.extend(outputs)
        model = ir.Model(graph, ir_version=11, functions=[self.definition])
        return ir.serde.serialize_model(model).SerializeToString()

    def pasts(self) -> tuple[str, ...]:
        """Returns which input's next state each output is, if any's."""
        if self.function == "Decide":
            return ("", "", "")
        return ("",) if self.function.endswith("MLP") else ("", "past_key", "past_value")

    def poisoned(self) -> list[NDArray]:
        """Returns memory for the outputs, full of what they must not be: NaN, or the other decision."""
        output = np.full(self.inputs["h"].shape, np.nan, self.dtype)
        if self.function == "Decide":
            _, execute, _ = self.expected()
            return [output, ~execute, np.full(execute.shape, np.nan, np.float32)]
        caches = []
        for name in filter(None, self.pasts()):
            batch, heads, slots, width = self.inputs[name].shape
            caches.append(np.full((batch, heads, max(slots, self.total), width), np.nan, self.dtype))
        return [output, *caches]

    @property
    def total(self) -> int:
        return self.inputs["mask"].shape[2]

    @property
    def in_place(self) -> bool:
        return "mask" in self.inputs and self.inputs["past_key"].shape[2] >= self.total

    def expected(self) -> list[NDArray]:
        """Returns the outputs, float64; of caches the slots in use."""
        unit = self._wide()
        if self.function == "Decide":
            return unit._decide()
        return [unit._contributed(unit._mlp())] if self.function.endswith("MLP") else unit._attention()

    def _wide(self) -> "Unit":
        """Returns the same unit in float64."""
        wide = {name: x.astype(np.float64) if x.dtype == self.dtype else x for name, x in self.inputs.items()}
        return replace(self, inputs=wide)

    def check(self, got: list[NDArray]) -> None:
        """Raises AssertionError unless these outputs are right."""
        assert [result.dtype for result in got] == [like.dtype for like in self.poisoned()]
        for result, wanted in zip(got, self.expected(), strict=True):
            if result.ndim == 4:
                result, unused = np.split(result, [self.total], axis=2)
                assert np.isnan(unused).all()  # nothing is written there
            if wanted.dtype == np.bool_:
                np.testing.assert_array_equal(result, wanted)
                continue
            if self.function == "Decide" and result.ndim == 3:
                result, wanted = (self.read(forecast) for forecast in (result, wanted))
            # Of few numbers all may be sums that cancel: of decisions they are held against what was added up, about 1.
            least = 1.0 if self.function == "Decide" else 1e-3
            errors = np.abs(result.astype(np.float64) - wanted)
            assert errors.size == 0 or np.isfinite(errors).all()
            if self.int4 is not None:
                assert rms(errors) <= self.int4_tolerance(errors.size) * max(rms(wanted), least), (
                    self.function,
                    rms(errors),
                )
            else:
                against = np.abs(wanted).max(initial=least)
                if self.function.endswith("MLP"):
                    against = np.maximum(against, self._added_up())
                error = (errors / against).max(initial=0)
                assert error <= TOLERANCE[result.dtype], (self.function, error)

    def _added_up(self) -> NDArray:
        """Returns how large an MLP's results would be if no sum in them cancelled."""
        unit = self._wide()
        x = unit.inputs

        def added(squares: NDArray, name: str) -> NDArray:
            return squares @ x[f"{name}_weight"] ** 2 + x.get(f"{name}_bias", np.zeros(1)) ** 2

        size = np.sqrt(added(added(x["h"] ** 2, "gate") * added(x["h"] ** 2, "up"), "down"))
        if (norm := x.get("post_norm")) is not None:
            y = unit._mlp()
            size *= np.abs(norm) / np.sqrt((y**2).mean(-1, keepdims=True) + self.attributes["epsilon"])
        return size * self.attributes["residual_multiplier"]

    def int4_tolerance(self, size: int) -> float:
        """Returns what the errors of so many values may be, as a share: at least that of one rounding to the other side."""
        return INT4_TOLERANCE[self.dtype] + 0.02 / max(size, 1) ** 0.5

    def read(self, forecast: NDArray) -> NDArray:
        """Returns what units read of a Decide's forecasts: not those of tokens that execute."""
        _, execute, _ = self.expected()
        return forecast[~execute]

    def _linear(self, h: NDArray, name: str) -> NDArray:
        weight = self.inputs[f"{name}_weight"]
        if self.int4 is not None:
            scales, zeros = (self.inputs.get(f"{name}_{part}") for part in ("scales", "zero_points"))
            zeros = (
                None if zeros is None else from_numpy(zeros if zeros.dtype == np.uint8 else zeros.astype(np.float32))
            )
            packed = Packed(from_numpy(weight), from_numpy(scales.astype(np.float32)), zeros, h.shape[-1])
            weight, h = packed.dequantised().numpy().T, _rounded(h)
        return h @ weight + self.inputs.get(f"{name}_bias", 0)

    def _norm(self, y: NDArray, weight: NDArray) -> NDArray:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + self.attributes["epsilon"]) * weight

    def _contributed(self, y: NDArray) -> NDArray:
        if (norm := self.inputs.get("post_norm")) is not None:
            y = self._norm(y, norm)
        y = y * self.attributes["residual_multiplier"]
        execute = self.inputs.get("execute")
        return y if execute is None else np.where(execute[..., None], y, self.inputs["forecast"])

    def _decide(self) -> list[NDArray]:
        x = self.inputs
        hidden = _silu(self._linear(x["h"], "hidden"))
        score = hidden @ x["out_weight"].astype(np.float64) + x["out_bias"]
        forecast = np.broadcast_to(x["up_bias"], x["h"].shape)
        if "down_weight" in x:
            forecast = self._linear(_silu(self._linear(x["h"], "down")), "up")
        return [forecast, score > x["threshold"], score]

    def _mlp(self) -> NDArray:
        gate, up = self._linear(self.inputs["h"], "gate"), self._linear(self.inputs["h"], "up")
        if self.attributes["activation"] == "silu":
            gate = _silu(gate)
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


_BUILT: dict[str, ir.Function] = {}


def _built(build: Callable[..., ir.Function], *arguments: Any) -> ir.Function:
    """Returns a function of these arguments; it is the same for many units, and takes longer to build than they to run."""
    key = repr((build, arguments))
    if key not in _BUILT:
        _BUILT[key] = build(*arguments)
    return _BUILT[key]


def rms(x: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def _rounded(h: NDArray) -> NDArray:
    """Activations as MatMulNBits takes them at accuracy level 4: int8, to the nearest, times a scale for each block of 32."""
    blocks = np.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, -h.shape[-1] % 32)]).reshape(*h.shape[:-1], -1, 32)
    peak = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    factor = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    rounded = np.rint(blocks * factor.astype(np.float64)) * (peak / np.float32(127)).astype(np.float64)
    return rounded.reshape(*h.shape[:-1], -1)[..., : h.shape[-1]]


def _silu(x: NDArray) -> NDArray:
    return x / (1 + np.exp(-x))

"""The routed decoder as an ONNX graph, written straight from the checkpoint's tensors; no model is loaded or traced.

x = embedding(input_ids)
in every layer, for attention, then for the MLP:
    h        = norm(x)
    forecast = up(silu(down(h)))
    execute  = score(h) > threshold
    x        = x + ir::RoutedAttention / ir::RoutedMLP (h, forecast, execute, weights)
    or, where the unit is not routed,
    x        = x + ir::DenseAttention / ir::DenseMLP (h, weights)
logits = head(norm(x))
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import GraphBuilder

import ir_convert
from ir_convert.checkpoint import Checkpoint
from ir_convert.families import UNITS, head_dim, projection_sizes, sliding_windows
from ir_convert.flops import Budget
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit

from .functions import DOMAIN, OPSET, VERSION, attention, mlp
from .names import tidy
from .positions import attention_masks, new_tokens, rotary_embedding, token_threshold
from .saved import flops_saved
from .weights import lazy_tensor

IR_VERSION = 10
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT

_DOC = """\
A decoder-only language model with informed routing. Every attention and MLP unit executes a token where the token's score
is above routing_threshold, and adds a forecast of its output where it is not. routing_threshold is optional: -inf is the
dense model, +inf approximates everything. routing_saved is the share of the linear FLOPs that this call saved. Keys and
values are kept for {kept}."""


def decoder(checkpoint: Checkpoint, routing: Routing, dtype: torch.dtype) -> ir.Model:
    """Builds the routed decoder.

    Inputs, B sequences of S new tokens after P cached ones: int64 input_ids ``[B, S]``, attention_mask ``[B, P + S]``,
    position_ids ``[B, S]``; past_key_values.N.key and .value ``[B, K, P, D]``; optional routing_threshold fp32 ``[1]``.
    Outputs: logits ``[B, S, vocab]``; present.N.key and .value ``[B, K, P + S, D]``; routing_saved fp32 ``[1]``: the share of
    the FLOPs that routing saved on this call's real tokens, as ``Budget.sparsity`` counts it.

    Padding, left or right, is what attention_mask says it is; padding tokens are never executed.

    Returns:
        A model whose weights are read from the checkpoint while it is being saved.
    """
    return _Decoder(checkpoint, routing, dtype).build()


def metadata(checkpoint: Checkpoint, routing: Routing) -> dict[str, Any]:
    """Returns what the model file says about itself (JSON, property ``ir_convert``)."""
    threshold = routing.threshold

    def sizes(size: Callable[[RoutedUnit], int]) -> dict[str, list[int | None]]:
        """By unit, then by layer; null for a unit that is not routed."""
        known = {key: size(unit) for key, unit in routing.units.items()}
        layers = range(checkpoint.config.num_hidden_layers)
        return {unit: [known.get((layer, unit)) for layer in layers] for unit in UNITS}

    return {
        "version": ir_convert.__version__,
        "base_model": routing.metadata.get("base_model", checkpoint.name),
        "weights_sha256": routing.metadata.get("weights_sha256"),
        "family": checkpoint.config.model_type,
        "recipe": routing.metadata.get("recipe"),
        "rank": sizes(lambda unit: unit.forecaster.rank),
        "router_width": sizes(lambda unit: unit.router.width),
        "kv_cache": routing.kv_cache,
        "sparsity": routing.sparsity,
        "threshold": threshold if math.isfinite(threshold) else str(threshold),  # JSON has no infinity
        "sparsity_curve": {"sparsity": routing.curve.sparsity, "threshold": routing.curve.threshold},
    }


class _Decoder:
    """The graph under construction."""

    def __init__(self, checkpoint: Checkpoint, routing: Routing, dtype: torch.dtype) -> None:
        self.checkpoint, self.routing, self.config = checkpoint, routing, checkpoint.config
        self.dtype, self.ir_dtype = dtype, from_torch_dtype(dtype)
        self.sizes = projection_sizes(self.config)
        self.head_dim = head_dim(self.config)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: VERSION}, name="ir_decoder")
        self.builder = GraphBuilder(self.graph)
        self.op = self.builder.op
        self.functions: dict[tuple[str, bool], ir.Function] = {}  # by unit, and whether it is routed
        self.executed: dict[tuple[int, str], ir.Value] = {}  # by routed unit

    def build(self) -> ir.Model:
        op, config, vocabulary = self.op, self.config, self.config.vocab_size
        input_ids = self.builder.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = self.builder.input("attention_mask", INT64, ["batch", "past+sequence"])
        position_ids = self.builder.input("position_ids", INT64, ["batch", "sequence"])
        pasts = [
            [
                self.builder.input(f"past_key_values.{layer}.{part}", self.ir_dtype, self._cache_shape("past"))
                for part in ("key", "value")
            ]
            for layer in range(config.num_hidden_layers)
        ]
        default = ir.tensor([self.routing.threshold], dtype=FLOAT, name="routing_threshold")
        threshold = self.builder.input("routing_threshold", FLOAT, [1], const_value=default)

        past = op.Shape(pasts[0][0], start=2, end=3)
        real = op.Cast(attention_mask, to=ir.DataType.BOOL)
        windows = sliding_windows(config)
        new = new_tokens(op, real, past)
        self.token_threshold = token_threshold(op, new, threshold)
        self.cos, self.sin = rotary_embedding(op, config, position_ids, self.ir_dtype)
        masks = attention_masks(op, real, past, set(windows))

        embedding = self._weight(self.checkpoint.family.embedding, vocabulary, config.hidden_size)
        x = op.Gather(embedding, input_ids, _outputs=["embedding"])
        presents = []
        for layer, window in enumerate(windows):
            x, *present = self._layer(x, layer, masks[window], pasts[layer])
            presents.append(present)
        logits = self._head(self._norm(x, self.checkpoint.family.final_norm), embedding)

        self._output(logits, "logits", ["batch", "sequence", vocabulary])
        for layer, present in enumerate(presents):
            for part, value in zip(("key", "value"), present, strict=True):
                self._output(value, f"present.{layer}.{part}", self._cache_shape("past+sequence"))
        budget = Budget.of(config, self.routing.units, self.routing.kv_cache)
        self._output(flops_saved(op, budget, self.executed, new), "routing_saved", [1], FLOAT)
        tidy(self.graph)
        self.graph.doc_string = _DOC.format(
            kept="every token" if self.routing.kv_cache == "full" else "executed tokens"
        )
        return ir.Model(
            self.graph,
            ir_version=IR_VERSION,
            producer_name="ir-convert",
            producer_version=ir_convert.__version__,
            functions=list(self.functions.values()),
            metadata_props={"ir_convert": json.dumps(metadata(self.checkpoint, self.routing))},
        )

    def _layer(self, x: ir.Value, layer: int, mask: ir.Value, past: list[ir.Value]) -> list[ir.Value]:
        """x -> norm, decide -> RoutedAttention -> + x -> norm, decide -> RoutedMLP -> + x;  returns x, key, value."""
        positions = {"cos": self.cos, "sin": self.sin, "mask": mask, "past_key": past[0], "past_value": past[1]}
        attributes = {
            "num_heads": self.config.num_attention_heads,
            "kv_num_heads": self.config.num_key_value_heads,
            "scale": self.head_dim**-0.5,
            "epsilon": self.config.rms_norm_eps,
        }
        x, key, value = self._unit(x, layer, "attention", positions, attributes, ["output", "key", "value"])
        (x,) = self._unit(x, layer, "mlp", {}, {}, ["output"])
        return [x, key, value]

    def _unit(
        self,
        x: ir.Value,
        layer: int,
        unit: str,
        inputs: dict[str, ir.Value],
        attributes: dict[str, int | float],
        outputs: list[str],
    ) -> list[ir.Value]:
        """x -> norm -> (decide) -> the unit's function -> + x;  returns x and the function's other outputs."""
        routed = self.routing.units.get((layer, unit))
        norm = f"{self.checkpoint.family.layers}.{layer}.{self.checkpoint.family.unit(unit).norm}.weight"
        with self._scope(f"layers.{layer}.{unit}"):
            inputs = inputs | {"h": self._norm(x, norm)} | self._unit_weights(layer, unit)
            if routed is not None:
                inputs |= self._decide(inputs["h"], layer, unit, routed)
                self.executed[layer, unit] = inputs["execute"]
            function = self._function(unit, routed is not None)
            arguments = [inputs.get(str(value.name)) for value in function.inputs]
            called = self.builder.call(function, *arguments, _outputs=outputs, **attributes)
            output, *others = [called] if len(outputs) == 1 else called
            output.type, output.shape = x.type, x.shape
            return [self.op.Add(x, output, _outputs=["x"]), *others]

    def _function(self, unit: str, routed: bool) -> ir.Function:
        """Returns what a unit calls; all layers share it."""
        if (unit, routed) not in self.functions:
            places = self.checkpoint.family.unit(unit)
            optional = [*self._biases(places.module), *places.extras]
            self.functions[unit, routed] = (
                mlp(optional, routed) if unit == "mlp" else attention(optional, routed, self.routing.kv_cache)
            )
        return self.functions[unit, routed]

    def _decide(self, h: ir.Value, layer: int, unit: str, routed: RoutedUnit) -> dict[str, ir.Value]:
        """h -> down -> silu -> up -> forecast;  h -> hidden -> silu -> out -> score > threshold -> execute

        The router is fp32 at every precision: its scores are compared with a threshold that was measured in fp32.
        """
        op, tensors = self.op, routed.tensors()

        def weight(name: str, dtype: torch.dtype) -> ir.Value:
            tensor = tensors[name]
            name = f"layers.{layer}.{unit}.{name}"
            return self._initializer(name, tuple(tensor.shape), lambda: tensor, dtype, transpose=tensor.ndim == 2)

        bias = weight("forecaster.bias", self.dtype)
        if routed.forecaster.rank == 0:
            forecast = op.Expand(bias, op.Shape(h), _outputs=["forecast"])
        else:
            down = op.MatMul(h, weight("forecaster.down", self.dtype))
            down = op.Add(down, weight("forecaster.down_bias", self.dtype))
            up = op.MatMul(op.Mul(down, op.Sigmoid(down)), weight("forecaster.up", self.dtype))
            forecast = op.Add(up, bias, _outputs=["forecast"])

        tall = h if self.dtype == torch.float32 else op.Cast(h, to=FLOAT)
        hidden = op.MatMul(tall, weight("router.hidden", torch.float32))
        hidden = op.Add(hidden, weight("router.hidden_bias", torch.float32))
        score = op.MatMul(op.Mul(hidden, op.Sigmoid(hidden)), weight("router.out", torch.float32))
        score = op.Squeeze(op.Add(score, weight("router.out_bias", torch.float32)), [-1], _outputs=["score"])
        return {"forecast": forecast, "execute": op.Greater(score, self.token_threshold, _outputs=["execute"])}

    def _unit_weights(self, layer: int, unit: str) -> dict[str, ir.Value]:
        """Returns a unit's weights by the names they have in the function's signature, e.g. ``q_weight``."""
        places = self.checkpoint.family.unit(unit)
        module = f"{self.checkpoint.family.layers}.{layer}.{places.module}"
        weights = {}
        for projection in places.kept + places.skipped:
            short, (inputs, outputs) = projection.removesuffix("_proj"), self.sizes[projection]
            weights[f"{short}_weight"] = self._weight(f"{module}.{projection}.weight", outputs, inputs, transpose=True)
            if f"{module}.{projection}.bias" in self.checkpoint.shards:
                weights[f"{short}_bias"] = self._weight(f"{module}.{projection}.bias", outputs)
        return weights | {name: self._weight(f"{module}.{name}.weight", self.head_dim) for name in places.extras}

    def _biases(self, module: str) -> list[str]:
        """Returns the biases that a unit's projections have, by their names in the function's signature."""
        prefix = f"{self.checkpoint.family.layers}.0.{module}."
        return [
            f"{projection.removesuffix('_proj')}_bias"
            for projection in self.sizes
            if f"{prefix}{projection}.bias" in self.checkpoint.shards
        ]

    def _head(self, x: ir.Value, embedding: ir.Value) -> ir.Value:
        if self.checkpoint.tied:
            # Stored once; ONNX Runtime folds the transpose when it loads: as fast as a transposed copy in the file.
            return self.op.MatMul(x, self.op.Transpose(embedding, perm=[1, 0]))
        head = self._weight(
            self.checkpoint.family.head, self.config.vocab_size, self.config.hidden_size, transpose=True
        )
        return self.op.MatMul(x, head)

    def _norm(self, x: ir.Value, weight: str) -> ir.Value:
        scale = self._weight(weight, self.config.hidden_size)
        return self.op.RMSNormalization(x, scale, epsilon=self.config.rms_norm_eps, _outputs=["h"])

    def _weight(self, name: str, *shape: int, transpose: bool = False) -> ir.Value:
        """Adds one of the checkpoint's tensors."""
        return self._initializer(name, shape, lambda: self.checkpoint.read(name), self.dtype, transpose)

    def _initializer(self, name: str, *args: Any, **kwargs: Any) -> ir.Value:
        return self.builder.initializer(lazy_tensor(name, *args, **kwargs), name, qualify=False)

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch", self.config.num_key_value_heads, length, self.head_dim]

    def _output(self, value: ir.Value, name: str, shape: list[int | str], dtype: ir.DataType | None = None) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype or self.ir_dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of nodes and values."""
        self.builder.push_module(name)
        yield
        self.builder.pop_module()

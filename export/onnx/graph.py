"""The routed decoder as an ONNX graph, written straight from the checkpoint's tensors; no model is loaded or traced.

x = embedding(input_ids)
in every layer, for attention, then for the MLP:
    h = norm(x)
    forecast, execute = ir::Decide (h, threshold, weights)
    x = x + ir::RoutedAttention / ir::RoutedMLP (h, forecast, execute, weights)
    or, where the unit is not routed,
    x = x + ir::DenseAttention / ir::DenseMLP (h, weights)
    An MLP that is a mixture of experts is RoutedMoE or DenseMoE. A unit without a norm sees x; its decision sees x over its RMS.
logits = head(norm(x))
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import GraphBuilder

import ir_convert
from ir_convert.checkpoint import Checkpoint
from ir_convert.families import UNITS, experts_of, head_dim, sliding_windows
from ir_convert.flops import Budget
from ir_convert.routing import Routing
from ir_convert.units import RoutedUnit

from .body import MICROSOFT, Features
from .decide import decision_weights
from .functions import DOMAIN, INT4_DOMAIN, OPSETS, OPTIONAL, VERSION, attention, decide, mlp, moe
from .int4 import Int4
from .int8 import ATTRIBUTES, int8_tensors
from .metadata import metadata
from .names import tidy
from .positions import attention_masks, last_tokens, new_tokens, slots, step_biases, token_threshold
from .rotary import rotations
from .saved import flops_saved, trace
from .stored import Stored

IR_VERSION = 11
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT

_DOC = """\
A decoder-only language model with informed routing. Every attention and MLP unit executes a token where the token's score
is above routing_threshold, and adds a forecast of its output where it is not. routing_threshold is optional: -inf is the
dense model, +inf approximates everything. routing_saved is the share of the linear FLOPs that this call saved. Keys and
values are kept for {kept}."""


def decoder(
    checkpoint: Checkpoint,
    routing: Routing,
    dtype: torch.dtype,
    int4: Int4 | None = None,
    traced: bool = False,
    logits: str = "all",
) -> ir.Model:
    """Builds the routed decoder.

    Inputs, B sequences of S new tokens: int64 input_ids ``[B, S]``, attention_mask ``[B, T]`` for these and the T - S before
    them, position_ids ``[B, S]``; past_key_values.N.key and .value ``[B, K, P, D]``, P = T - S, or P >= T: then they are
    buffers with room, to bind as present too; optional routing_threshold fp32 ``[1]``.
    Outputs: logits ``[B, S, vocab]``, or ``[B, 1, vocab]`` of each sequence's last real token with ``last`` logits, in fp32
    where ``dtype`` is bfloat16, which numpy has not; present.N.key and .value ``[B, K, max(P, T), D]``; routing_saved fp32
    ``[1]``: the share of the FLOPs that routing saved on this call's real tokens, as ``Budget.sparsity`` counts it. With
    ``traced``, executed bool ``[layers, 2, B, S]``: which tokens each layer's attention and MLP executed.

    Padding, left or right, is what attention_mask says it is; padding tokens are never executed.

    Returns:
        A model whose weights are read from the checkpoint while it is being saved.
    """
    return _Decoder(checkpoint, routing, dtype, int4, traced, logits).build()


class _Decoder:
    """The graph under construction."""

    def __init__(
        self, checkpoint: Checkpoint, routing: Routing, dtype: torch.dtype, int4: Int4 | None, traced: bool, logits: str
    ) -> None:
        self.checkpoint, self.routing, self.config = checkpoint, routing, checkpoint.config
        self.dtype, self.ir_dtype = dtype, from_torch_dtype(dtype)
        self.traced, self.last, self.int4 = traced, logits == "last", int4
        self.head_dim = head_dim(self.config)
        self.forecasts = any(unit.forecaster.rank for unit in routing.units.values())
        # On a GPU, where float16 is at home, a step is bound by launches more than by bytes, and the native kernels decide.
        self.decision_int4: Int4 | None = None
        if int4 is not None and self.forecasts and dtype == torch.float32:
            self.decision_int4 = Int4(accuracy_level=int4.accuracy_level)
        domains = {DOMAIN: VERSION} if int4 is None or (routing.units and self.decision_int4 is None) else {}
        domains |= {} if int4 is None else {INT4_DOMAIN: VERSION}
        self.graph = ir.Graph(
            [],
            [],
            nodes=[],
            opset_imports={**OPSETS, **domains},
            name="ir_decoder",
        )
        self.builder = GraphBuilder(self.graph)
        self.op = self.builder.op
        self.stored = Stored(self.builder, checkpoint, dtype, int4)
        family = checkpoint.family
        self.features = Features(
            activation=getattr(self.config, family.activation),
            whole_norms=family.attention.whole_norms,
            scaled=family.residual_multiplier(self.config) != 1,
            normalised=getattr(self.config, "norm_topk_prob", True),
        )
        self.functions: dict[tuple[str, bool], ir.Function] = {}  # by unit, and whether it is routed
        self.executed: dict[tuple[int, str], ir.Value] = {}  # by routed unit

    def build(self) -> ir.Model:
        op, config, vocabulary = self.op, self.config, self.config.vocab_size
        input_ids = self.builder.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = self.builder.input("attention_mask", INT64, ["batch", "total"])
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

        self.slots = slots(op, input_ids, attention_mask, pasts[0][0])
        real = op.Cast(attention_mask, to=ir.DataType.BOOL)
        windows = sliding_windows(config)
        new = new_tokens(op, real, self.slots.first)
        self.token_threshold = token_threshold(op, new, threshold)
        self.rotations = rotations(op, config, position_ids, self.ir_dtype)
        masks = attention_masks(op, real, self.slots.places, set(windows))
        biases = step_biases(op, masks, self.ir_dtype)

        family = self.checkpoint.family
        embedding = self.stored.weight(family.embedding, vocabulary, config.hidden_size)
        x = op.Gather(embedding, input_ids, _outputs=["embedding"])
        if (scale := family.embedding_scale(config)) != 1:
            x = op.Mul(x, scale, _outputs=["scaled_embedding"])
        presents = []
        for layer, window in enumerate(windows):
            x, *present = self._layer(x, layer, masks[window], biases[window], pasts[layer])
            presents.append(present)
        x = last_tokens(op, x, new) if self.last else x
        logits = self._capped(self._head(self._norm(x, family.final_norm), embedding))

        readable = FLOAT if self.ir_dtype == ir.DataType.BFLOAT16 else self.ir_dtype
        logits = logits if readable == self.ir_dtype else op.Cast(logits, to=readable)
        self._output(logits, "logits", ["batch", 1 if self.last else "sequence", vocabulary], readable)
        for layer, present in enumerate(presents):
            for part, value in zip(("key", "value"), present, strict=True):
                self._output(value, f"present.{layer}.{part}", self._cache_shape("present"))
        budget = Budget.of(config, self.routing.units, self.routing.kv_cache)
        self._output(flops_saved(op, budget, self.executed, new), "routing_saved", [1], FLOAT)
        if self.traced:
            shape: list[int | str] = [config.num_hidden_layers, len(UNITS), "batch", "sequence"]
            flags = trace(op, self.executed, new, config.num_hidden_layers)
            self._output(flags, "executed", shape, ir.DataType.BOOL)
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

    def _layer(
        self, x: ir.Value, layer: int, mask: ir.Value, step_bias: ir.Value, past: list[ir.Value]
    ) -> list[ir.Value]:
        """x -> norm, decide -> RoutedAttention -> + x -> norm, decide -> RoutedMLP -> + x;  returns x, key, value."""
        family, rotation = self.checkpoint.family, self.rotations[layer]
        positions = {"cos": rotation.cos, "sin": rotation.sin, "mask": mask, "step_bias": step_bias}
        positions |= {"start": self.slots.start, "total": self.slots.total, "step": self.slots.step}
        positions |= {"past_key": past[0], "past_value": past[1]}
        attributes: dict[str, int | float | str] = {
            "num_heads": self.config.num_attention_heads,
            "kv_num_heads": self.config.num_key_value_heads,
            "head_dim": self.head_dim,
            "scale": family.attention_scale(self.config),
            "epsilon": self.config.rms_norm_eps,
        }
        if (softcap := family.attention_softcap(self.config)) is not None:
            attributes["softcap"] = softcap
        if rotation.width != self.head_dim:
            attributes["rotary_dim"] = rotation.width
        x, key, value = self._unit(x, layer, "attention", positions, attributes, ["output", "key", "value"])
        attributes = {"epsilon": self.config.rms_norm_eps} if family.mlp.post_norm else {}
        if (experts := experts_of(self.config)) is not None:
            attributes |= {"experts_per_token": experts.active, "normalize": int(self.features.normalised)}
        if self.features.activation != "silu":
            attributes["activation"] = self.features.activation
        (x,) = self._unit(x, layer, "mlp", {}, attributes, ["output"])
        return [x, key, value]

    def _unit(
        self,
        x: ir.Value,
        layer: int,
        unit: str,
        inputs: dict[str, ir.Value],
        attributes: dict[str, int | float | str],
        outputs: list[str],
    ) -> list[ir.Value]:
        """x -> (norm) -> (decide) -> the unit's function -> + x;  returns x and the function's other outputs."""
        family, scope = self.checkpoint.family, f"layers.{layer}.{unit}"
        routed, norm = self.routing.units.get((layer, unit)), family.unit(unit).norm
        with self._scope(scope):
            h = x if norm is None else self._norm(x, f"{family.layers}.{layer}.{norm}.weight")
            weights = self.stored.unit(layer, unit)
            inputs = inputs | {"h": h} | weights
            if routed is not None:
                seen = self._normed(x, self.stored.ones()) if norm is None else h
                inputs["forecast"], inputs["execute"] = self._decide(seen, routed, scope)
                self.executed[layer, unit] = inputs["execute"]
            function = self._function(unit, routed is not None, weights)
            arguments = [inputs.get(str(value.name)) for value in function.inputs]
            if self.features.scaled:
                attributes = attributes | {"residual_multiplier": family.residual_multiplier(self.config)}
            called = self.builder.call(function, *arguments, _outputs=outputs, **attributes)
            output, *others = [called] if len(outputs) == 1 else called
            output.type, output.shape = x.type, x.shape
            return [self.op.Add(x, output, _outputs=["x"]), *others]

    def _decide(self, h: ir.Value, routed: RoutedUnit, scope: str) -> tuple[ir.Value, ir.Value]:
        """Returns forecast ``[B, S, hidden]`` and execute ``[B, S]``."""
        weights, attributes = decision_weights(self.stored, routed, scope, self.forecasts, self.decision_int4)
        inputs = {"h": h, "threshold": self.token_threshold} | weights
        if ("decide", True) not in self.functions:
            self.functions["decide", True] = decide(self.forecasts, self.ir_dtype, self.decision_int4)
        function = self.functions["decide", True]
        arguments = [inputs.get(str(value.name)) for value in function.inputs]
        outputs = ["forecast", "execute", "score"]
        forecast, execute, _ = self.builder.call(function, *arguments, _outputs=outputs, **attributes)
        return forecast, execute

    def _function(self, unit: str, routed: bool, weights: Collection[str]) -> ir.Function:
        """Returns what a unit with these weights calls; all layers share it."""
        if (unit, routed) not in self.functions:
            optional = [name for name in weights if name.endswith(OPTIONAL)]
            int4 = self.stored.int4_attributes(unit)
            if unit == "attention":
                kv_cache = self.routing.kv_cache
                function = attention(optional, routed, kv_cache, self.ir_dtype, int4, self.features)
            elif experts_of(self.config) is None:
                function = mlp(optional, routed, self.ir_dtype, int4, self.features)
            else:
                function = moe(optional, routed, self.ir_dtype, int4, self.features)
            self.functions[unit, routed] = function
        return self.functions[unit, routed]

    def _head(self, x: ir.Value, embedding: ir.Value) -> ir.Value:
        name, shape = self.checkpoint.family.head, (self.config.vocab_size, self.config.hidden_size)
        if self.int4 is not None:
            packed, scales = int8_tensors(name, shape, partial(self.checkpoint.read, name), self.dtype)
            weights = self.stored.add(packed), self.stored.add(scales)
            return self.op.MatMulNBits(x, *weights, N=shape[0], K=shape[1], **ATTRIBUTES, _domain=MICROSOFT)
        if self.checkpoint.tied:
            # Stored once; ONNX Runtime folds the transpose when it loads: as fast as a transposed copy in the file.
            return self.op.MatMul(x, self.op.Transpose(embedding, perm=[1, 0]))
        return self.op.MatMul(x, self.stored.weight(name, *shape, transpose=True))

    def _capped(self, logits: ir.Value) -> ir.Value:
        """logits -> (/ divisor) -> (c tanh(. / c))"""
        op, family = self.op, self.checkpoint.family
        divisor, softcap = family.logit_divisor(self.config), family.logit_softcap(self.config)
        logits.type = ir.TensorType(self.ir_dtype)  # also where the operator is not ONNX's own
        if divisor != 1:
            logits = op.Div(logits, divisor)
        return logits if softcap is None else op.Mul(op.Tanh(op.Div(logits, softcap)), softcap)

    def _norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self._normed(x, self.stored.norm(weight, self.config.hidden_size))

    def _normed(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self.op.RMSNormalization(x, scale, epsilon=self.config.rms_norm_eps, _outputs=["h"])

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

"""Rotary embeddings: cosines and sines of every layer, computed once per run."""

import json
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from transformers import AutoModelForCausalLM, PretrainedConfig

from ir_convert.errors import UserError
from ir_convert.families import family_of
from ir_convert.rope import rebuilt, rope_parameters, rotary_embedding

from .body import largest

LONG = "longrope"


class Frequencies(NamedTuple):
    """What a layer's cosines and sines are made of.

    Attributes:
        inverse: ``[R / 2]`` in fp32, R the rotated part of a head.
        scale: the factor of cosines and sines.
        long: those of texts that are longer than ``bound`` tokens; None where there are none.
    """

    inverse: torch.Tensor
    scale: float
    long: torch.Tensor | None = None
    bound: int = 0


class Rotation(NamedTuple):
    """cos and sin ``[B, S, R / 2]``, and R."""

    cos: ir.Value
    sin: ir.Value
    width: int


def long_text_bound(config: PretrainedConfig, layer: int = 0) -> int | None:
    """Returns how many tokens a text may have before it gets frequencies of long texts; None where it never does.

    Keys that were cached before have those of short texts: who generates runs the whole text again where it passes the bound.
    """
    parameters = rope_parameters(config, layer)
    if parameters.get("rope_type") != LONG:
        return None
    return parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings


def frequencies(config: PretrainedConfig, layer: int = 0) -> Frequencies:
    """Asks the model's own code for a layer's rotary embedding.

    Raises:
        UserError: the kind of rotary embedding is not supported.
    """
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(config).get_decoder()
    module, layer_kind = rotary_embedding(inner, config, layer)
    prefix = "" if layer_kind is None else f"{layer_kind}_"
    kind = module.rope_type if layer_kind is None else module.rope_type[layer_kind]
    if kind == "dynamic":
        raise UserError(
            f"rotary embedding of type '{kind}' depends on the input's length; ONNX export does not support it"
        )
    rotary = rebuilt(module)  # on the CPU
    inverse, scale = getattr(rotary, f"{prefix}inv_freq").float().clone(), getattr(rotary, f"{prefix}attention_scaling")
    if (bound := long_text_bound(config, layer)) is None:
        return Frequencies(inverse, float(scale))
    rotary(torch.zeros(1), torch.tensor([[bound]]))  # which leaves it with those of long texts
    return Frequencies(inverse, float(scale), rotary.inv_freq.float(), bound)


def rotations(op: OpBuilder, config: PretrainedConfig, position_ids: ir.Value, dtype: ir.DataType) -> list[Rotation]:
    """Returns every layer's rotation of tokens at position_ids ``[B, S]``; layers of one kind share theirs.

    A layer that does not rotate gets frequencies of 0, whose cosines and sines change nothing: so the units' functions are the
    same for all layers.
    """
    rotates = family_of(config).rope_layers(config) or [1] * config.num_hidden_layers
    kinds: dict[str, Rotation] = {}
    layers = []
    for layer, on in enumerate(rotates):
        kind = json.dumps([bool(on), rope_parameters(config, layer)], sort_keys=True)
        if kind not in kinds:
            found = frequencies(config, layer)
            if not on:
                found = Frequencies(torch.zeros_like(found.inverse), 1.0)
            name = f"rotary_{len(kinds) + 1}" if kinds else "rotary"
            kinds[kind] = _rotation(op, found, position_ids, dtype, name)
        layers.append(kinds[kind])
    return layers


def _rotation(op: OpBuilder, found: Frequencies, position_ids: ir.Value, dtype: ir.DataType, name: str) -> Rotation:
    """position_ids ``[B, S]`` -> * frequencies -> cos, sin -> (scale) -> ``[B, S, R / 2]``, computed in fp32."""
    inverse = op.initializer(ir.tensor(found.inverse.numpy()), f"{name}.frequencies")
    if found.long is not None:
        # Each text by its own length, as it would be alone.
        last = op.Unsqueeze(largest(op, position_ids, 1), [-1])  # [B, 1, 1]
        long = op.initializer(ir.tensor(found.long.numpy()), f"{name}.long_frequencies")
        inverse = op.Where(op.GreaterOrEqual(last, found.bound), long, inverse)  # [B, 1, R / 2]
    positions = op.Unsqueeze(op.Cast(position_ids, to=ir.DataType.FLOAT), [-1])
    angles = op.Mul(positions, inverse, _outputs=[f"{name}.angles"])
    parts = []
    for part, value in (("cos", op.Cos(angles)), ("sin", op.Sin(angles))):
        value = value if found.scale == 1 else op.Mul(value, found.scale)
        parts.append(op.Cast(value, to=dtype, _outputs=[f"{name}.{part}"]))
    return Rotation(parts[0], parts[1], 2 * len(found.inverse))

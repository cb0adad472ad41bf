"""What a graph computes once per run: rotary embedding, attention masks, and which tokens may execute at all."""

import math

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from transformers import AutoModelForCausalLM, PretrainedConfig

from ir_convert.errors import UserError

# These stretch their frequencies by the length of the input, which constants cannot follow.
LENGTH_DEPENDENT = ("dynamic", "longrope")
END = 2**63 - 1


def frequencies(config: PretrainedConfig) -> tuple[torch.Tensor, float]:
    """Asks the model's own code for its rotary embedding.

    Returns:
        Inverse frequencies ``[head_dim / 2]`` in fp32, and the factor of cos and sin.

    Raises:
        UserError: the kind of rotary embedding is not supported.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.get_decoder().rotary_emb)(config=config)
    if not isinstance(rotary.rope_type, str) or rotary.rope_type in LENGTH_DEPENDENT:
        raise UserError(
            f"rotary embedding of type '{rotary.rope_type}' depends on the input's length; ONNX export does not support it"
        )
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def rotary_embedding(
    op: OpBuilder, config: PretrainedConfig, position_ids: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """position_ids ``[B, S]`` -> * frequencies -> cos, sin -> (scale) -> ``[B, S, head_dim / 2]``, computed in fp32."""
    inverse, scale = frequencies(config)
    inverse_frequencies = op.initializer(ir.tensor(inverse.numpy()), "rotary.frequencies")
    positions = op.Unsqueeze(op.Cast(position_ids, to=ir.DataType.FLOAT), [-1])
    angles = op.Mul(positions, inverse_frequencies, _outputs=["rotary.angles"])
    parts = []
    for name, value in (("cos", op.Cos(angles)), ("sin", op.Sin(angles))):
        value = value if scale == 1 else op.Mul(value, scale)
        parts.append(op.Cast(value, to=dtype, _outputs=[f"rotary.{name}"]))
    return parts[0], parts[1]


def attention_masks(
    op: OpBuilder, real: ir.Value, past: ir.Value, windows: set[int | None]
) -> dict[int | None, ir.Value]:
    """Builds one mask ``bool[B, S, P + S]`` for each distinct sliding window, from which tokens are ``real[B, P + S]``.

        real -> Shape -> Range: place of every key [P + S] -> Slice(past): place of every query [S]
        visible = key <= query  (and key > query - window)  and (real[key] or key = query)

    Places count cache slots, padding included, as everywhere in transformers; so left and right padding, a prompt in
    several pieces, and single steps are all the same to it. Every token sees itself: padding that saw nothing would turn
    into NaN, which reaches real tokens through the next layer's values.
    """
    real = op.Unsqueeze(real, [1])  # [B, 1, P + S]
    total = op.Squeeze(op.Shape(real, start=2, end=3))
    keys = op.Range(0, total, 1)
    queries = op.Unsqueeze(op.Slice(keys, past, [END]), [1])  # [S, 1]
    causal = op.LessOrEqual(keys, queries)  # [S, P + S]
    real = op.Or(real, op.Equal(keys, queries))  # [B, S, P + S]
    masks = {}
    for window in sorted(windows, key=lambda window: window or math.inf):
        visible = causal
        name = "attention.visible"
        if window is not None:
            visible = op.And(causal, op.Greater(keys, op.Sub(queries, window)))
            name += f".window_{window}"
        masks[window] = op.And(real, visible, _outputs=[name])
    return masks


def new_tokens(op: OpBuilder, real: ir.Value, past: ir.Value) -> ir.Value:
    """real ``[B, P + S]`` -> ``[B, S]``: which of the new tokens are real."""
    return op.Slice(real, past, [END], [1], _outputs=["new_tokens"])


def token_threshold(op: OpBuilder, new: ir.Value, threshold: ir.Value) -> ir.Value:
    """threshold ``[1]`` -> ``[B, S]``: the threshold for real tokens, +inf for padding, which therefore never executes."""
    return op.Where(new, threshold, math.inf, _outputs=["token_threshold"])

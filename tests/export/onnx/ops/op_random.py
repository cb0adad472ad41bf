"""Random calls of every function, awkward ones among them."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from op_units import Unit
from torch import from_numpy

from ir_convert.export.onnx.int4 import Int4, quantise

EXECUTES = ("none", "one", "all", "random", "ragged")


def execute_mask(rng: np.random.Generator, kind: str, batch: int, length: int) -> NDArray:
    """Which tokens execute: ``ragged`` is nothing in the first sequence, everything in the last."""
    if kind == "one":
        return np.arange(batch * length).reshape(batch, length) == rng.integers(batch * length)
    share = {"none": 0.0, "all": 1.0, "random": 0.5, "ragged": np.linspace(0, 1, batch)[:, None]}[kind]
    return rng.random((batch, length)) < share


def random_decide(
    rng: np.random.Generator,
    batch: int,
    length: int,
    width: int = 64,
    rank: int = 12,
    hidden: int = 8,
    execute: str = "random",
    dtype: type = np.float32,
    int4: Int4 | None = None,
) -> Unit:
    """Returns a Decide with these decisions, by margins that no rounding crosses; with a rank of 0, without a forecaster."""
    weights, rows = {}, {}
    if rank:
        weights, rows = {"down_weight": (width, rank), "up_weight": (rank, width)}, {"down_bias": rank}
    inputs = {"h": rng.standard_normal((batch, length, width))} | _weights(rng, weights, rows | {"up_bias": width})
    router = _weights(
        rng, {"hidden_weight": (width, hidden)}, {"hidden_bias": hidden, "out_weight": hidden, "out_bias": 1}
    )
    inputs = _cast(inputs, dtype) | {name: x.astype(np.float32) for name, x in router.items()}
    attributes = {"hidden_size": width, "rank": rank, "codes": rank + hidden + 1} if int4 else {}
    unit = Unit("Decide", inputs | {"threshold": np.zeros((batch, length), np.float32)}, attributes)
    if int4 is not None:
        unit = quantised(unit, int4)
    _, _, score = unit.expected()
    margin = np.where(execute_mask(rng, execute, batch, length), -0.01, 0.01) * (1 + np.abs(score).max())
    return replace(unit, inputs={**unit.inputs, "threshold": (score + margin).astype(np.float32)})


def quantised(unit: Unit, int4: Int4) -> Unit:
    """Returns the same call with its weights in int4."""
    inputs = dict(unit.inputs)
    for name in unit.projections():
        packed = quantise(from_numpy(inputs[f"{name}_weight"].T.astype(np.float32)), int4)
        for part, tensor in packed.parts().items():
            array = tensor.numpy()
            inputs[f"{name}_{part}"] = array if array.dtype == np.uint8 else array.astype(unit.dtype)
    return replace(unit, inputs=inputs, int4=int4)


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

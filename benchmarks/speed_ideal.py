"""What routing could gain at best: the work a routed model is left with, over the dense model's.

Prefill is bound by arithmetic: FLOPs of the layers' projections for executed tokens (keys and values for all), forecasters
and routers for all tokens, the attention core for executed queries (each against the keys it sees), and the head for every
position, or each sequence's last. Decode is bound by memory: bytes of weights read in a step. A unit's skipped projections
are read if any token of the batch executes it, once for the whole batch; the rest, forecasters, routers and the head are
read always.
Embedding, norms, rotary embedding and softmax are not counted, nor is the cache that decode reads: on either side.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from ir_convert.families import head_dim
from ir_convert.flops import Budget, Key, forecaster_flops, router_flops
from ir_convert.units import Units

Flags = Mapping[Key, NDArray[np.bool_]]  # executed[B, S] by routed unit

# Bytes of a weight; int4, and the int8 of its head, in blocks of 32 with an fp32 scale each. A router's last layer is too small
# to matter.
BYTES = {"fp32": 4.0, "fp16": 2.0, "int4": 0.5 + 4 / 32}
HEAD_BYTES = BYTES | {"int4": 1 + 4 / 32}
ROUTER_BYTES = BYTES | {"fp16": 4.0}


def dense_flops(config: PretrainedConfig, batch: int, length: int, past: int = 0, logits: str = "all") -> int:
    """Returns the dense model's FLOPs of one call; ``last`` logits are one of each sequence."""
    budget, tokens = Budget.of(config, {}), batch * length
    head = 2 * config.hidden_size * config.vocab_size * (batch if logits == "last" else tokens)
    return budget.layers * (budget.dense * tokens + batch * int(_core(config, length, past).sum())) + head


def dense_bytes(config: PretrainedConfig, precision: str) -> float:
    """Returns the bytes of weights that a step of the dense model reads."""
    budget = Budget.of(config, {})
    # One token takes two FLOPs for a weight.
    units, head = budget.layers * budget.dense / 2, config.hidden_size * config.vocab_size
    return BYTES[precision] * units + HEAD_BYTES[precision] * head


def _core(config: PretrainedConfig, length: int, past: int) -> NDArray[np.int64]:
    """Returns the FLOPs of attention's core by query."""
    return 4 * config.num_attention_heads * head_dim(config) * (past + 1 + np.arange(length))


def prefill_ideal(config: PretrainedConfig, units: Units, executed: Flags, past: int = 0, logits: str = "all") -> float:
    """Returns the FLOPs of one call over the dense model's.

    Args:
        config: of the model.
        units: the routed units.
        executed: what each of them executed.
        past: how many tokens the cache held.
        logits: of all tokens, or of each sequence's last.
    """
    budget = Budget.of(config, units)
    batch, length = next(iter(executed.values())).shape
    tokens = batch * length
    core, dense = _core(config, length, past), dense_flops(config, batch, length, past, logits)
    saved = sum(budget.saved[unit] * int((~flags).sum()) for (_, unit), flags in executed.items())
    saved += sum(int((~flags * core).sum()) for (_, unit), flags in executed.items() if unit == "attention")
    return (dense - saved + tokens * sum(budget.overhead.values())) / dense


def decode_ideal(config: PretrainedConfig, units: Units, steps: Sequence[Flags], precision: str) -> float:
    """Returns the bytes of weights that steps read, over the dense model's; the mean over the steps.

    Args:
        config: of the model.
        units: the routed units.
        steps: what each of them executed, by step: ``[B, 1]``.
        precision: fp32, fp16 or int4.
    """
    budget = Budget.of(config, units)
    weight, dense = BYTES[precision] / 2, dense_bytes(config, precision)
    overhead = sum(
        BYTES[precision] / 2 * forecaster_flops(config.hidden_size, unit.forecaster.rank)
        + ROUTER_BYTES[precision] / 2 * router_flops(config.hidden_size, unit.router.width)
        for unit in units.values()
    )
    saved = [sum(weight * budget.saved[unit] for (_, unit), flags in step.items() if not flags.any()) for step in steps]
    return (dense + overhead - float(np.mean(saved))) / dense


def sparsity(config: PretrainedConfig, units: Units, calls: Sequence[Flags]) -> float:
    """Returns the share of the linear FLOPs that calls of the same size saved, as ``ir_convert/flops.py`` counts it."""
    budget = Budget.of(config, units)
    return budget.sparsity({key: 1 - float(np.mean([call[key].mean() for call in calls])) for key in calls[0]})

"""What the graph takes from the checkpoint: each tensor becomes an initializer, by the name and in the shape that nodes want."""

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import GraphBuilder

from ir_convert.checkpoint import Checkpoint
from ir_convert.experts import PACKED, PARTS, PLAIN
from ir_convert.families import experts_of, head_dim, packed_rows, projection_sizes

from .experts import MOE_PROJECTIONS, expert_weights, int4_expert_tensors, stacked
from .int4 import Int4, int4_tensors
from .weights import LazyWeight


class Stored:
    """The checkpoint's tensors in a graph under construction; each is read while the model is being saved.

    Args:
        builder: of the graph.
        checkpoint: where they are.
        dtype: what they are converted to.
        int4: how to quantise the units' projections; None for not at all.
    """

    def __init__(self, builder: GraphBuilder, checkpoint: Checkpoint, dtype: torch.dtype, int4: Int4 | None) -> None:
        self.dtype = dtype
        self._builder, self._checkpoint, self._int4 = builder, checkpoint, int4
        self._family, self._config = checkpoint.family, checkpoint.config
        self._ones: ir.Value | None = None

    def add(self, tensor: ir.LazyTensor) -> ir.Value:
        return self._builder.initializer(tensor, tensor.name, qualify=False)

    def initializer(self, name: str, *args: Any, **kwargs: Any) -> ir.Value:
        """Adds a tensor of any origin; the arguments are those of ``LazyWeight``."""
        return self.add(LazyWeight(name, *args, **kwargs))

    def weight(self, name: str, *shape: int, transpose: bool = False) -> ir.Value:
        """Adds one of the checkpoint's tensors."""
        return self.initializer(name, shape, lambda: self._checkpoint.read(name), self.dtype, transpose)

    def matrix(
        self,
        short: str,
        name: str,
        shape: tuple[int, int],
        read: Callable[[], torch.Tensor],
        dtype: torch.dtype,
        int4: Int4 | None,
    ) -> dict[str, ir.Value]:
        """Adds a linear layer's weight ``[out, in]``, quantised where ``int4`` says how; returns its parts as signatures name them.

        Args:
            short: the layer's name in the signature: ``short_weight``, and in int4 ``short_scales``, ``short_zero_points``.
            name: of the tensor.
        """
        if int4 is None:
            return {f"{short}_weight": self.initializer(name, shape, read, dtype, transpose=True)}
        parts = int4_tensors(name, shape, read, int4, dtype)
        return {f"{short}_{part}": self.add(tensor) for part, tensor in parts.items()}

    def norm(self, name: str, width: int) -> ir.Value:
        """Adds an RMS norm's weight ``[width]``, as RMSNormalization multiplies by it."""
        offset = self._family.norm_offset
        if offset == 0:
            return self.weight(name, width)
        return self.initializer(name, (width,), lambda: self._checkpoint.read(name).float() + offset, self.dtype)

    def ones(self) -> ir.Value:
        """The weight ``[hidden]`` of a norm that has none."""
        if self._ones is None:
            width = self._config.hidden_size
            tensor = ir.tensor(torch.ones(width, dtype=self.dtype), name="norm.ones")
            self._ones = self._builder.initializer(tensor, "norm.ones", qualify=False)
            self._ones.type = ir.TensorType(from_torch_dtype(self.dtype))
        return self._ones

    def unit(self, layer: int, unit: str) -> dict[str, ir.Value]:
        """Adds a unit's weights; returns them by the names they have in the function's signature, e.g. ``q_weight``."""
        places, sizes = self._family.unit(unit), projection_sizes(self._config)
        inside = f"{self._family.layers}.{layer}"
        module = f"{inside}.{places.module}"
        weights: dict[str, ir.Value] = {}
        if places.experts is not None:
            return self._mixture(module)
        for projection in places.kept + places.skipped:
            short, (inputs, outputs) = short_name(projection), sizes[projection]
            name, read = f"{module}.{projection}.weight", self._reader(module, unit, projection, "weight")
            assert read is not None
            weights |= self.matrix(short, name, (outputs, inputs), read, self.dtype, self._int4)
            if (read := self._reader(module, unit, projection, "bias")) is not None:
                weights[f"{short}_bias"] = self.initializer(f"{module}.{projection}.bias", (outputs,), read, self.dtype)
        for name in places.extras:
            width = sizes[f"{name[0]}_proj"][1] if places.whole_norms else head_dim(self._config)
            weights[name] = self.norm(f"{module}.{name}.weight", width)
        if places.post_norm is not None:
            weights["post_norm"] = self.norm(f"{inside}.{places.post_norm}.weight", self._config.hidden_size)
        return weights

    def _mixture(self, module: str) -> dict[str, ir.Value]:
        """A mixture of experts; the scores that choose them are not quantised."""
        experts = experts_of(self._config)
        assert experts is not None
        d, f, inside = self._config.hidden_size, experts.width, f"{module}.{self._family.mlp.experts}"
        weights = {"gate_weight": self.weight(f"{module}.gate.weight", experts.count, d, transpose=True)}
        for packed, parts, matrix in ((PACKED, PARTS, (2 * f, d)), (PLAIN, (PLAIN,), (d, f))):
            name, short, shape = f"{inside}.{packed}", short_name(packed), (experts.count, *matrix)
            each = partial(expert_weights, self._checkpoint, inside, packed, parts, matrix)
            if self._int4 is None:
                weights[f"{short}_weight"] = self.initializer(
                    name, shape, partial(stacked, shape, each, self.dtype), self.dtype
                )
            else:
                tensors = int4_expert_tensors(name, shape, each, self._int4, self.dtype)
                weights |= {f"{short}_{part}": self.add(tensor) for part, tensor in tensors.items()}
        return weights

    def int4_attributes(self, unit: str) -> dict[str, dict[str, int]] | None:
        """Returns MatMulNBits' attributes by the unit's projections, or QMoE's; None where weights are not quantised."""
        if self._int4 is None:
            return None
        if self._family.unit(unit).experts is not None:
            return dict.fromkeys(MOE_PROJECTIONS, self._int4.expert_attributes)
        places, sizes = self._family.unit(unit), projection_sizes(self._config)
        return {short_name(name): self._int4.attributes(*sizes[name][::-1]) for name in places.kept + places.skipped}

    def _reader(self, module: str, unit: str, projection: str, part: str) -> Callable[[], torch.Tensor] | None:
        """Returns what reads a projection's weight or bias, its rows alone of a packed one; None where there is none."""
        tensor, rows = packed_rows(self._config, unit, projection)
        name = f"{module}.{tensor}.{part}"
        if part == "bias" and name not in self._checkpoint.shards:
            return None
        return lambda: self._checkpoint.read(name)[rows or slice(None)]


def short_name(projection: str) -> str:
    """``q_proj`` -> ``q``, as the functions call it."""
    return projection.removesuffix("_proj")

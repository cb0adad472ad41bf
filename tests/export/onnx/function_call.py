"""One call of a unit's function in ONNX Runtime, on inputs of any shape; and what the tests of functions draw and compare with."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from onnxscript import GraphBuilder
from torch import Tensor
from torch.nn import functional as F

from ir_convert.export.onnx.experts import MOE_PROJECTIONS
from ir_convert.export.onnx.functions import OPSETS, VERSION
from ir_convert.export.onnx.int4 import Int4, quantise

D, FFN, HEAD, EPSILON = 12, 20, 8, 1e-5
TYPES = {
    torch.bool: ir.DataType.BOOL,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.float16: ir.DataType.FLOAT16,
    torch.float32: ir.DataType.FLOAT,
}

methods = st.sampled_from([None, None, "rtn", "k_quant", "hqq"])
factors = st.sampled_from([1.0, 1.0, 0.4])
activations = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
execute_masks = st.sampled_from(["none", "one", "all", "random", "ragged"])


def execute_mask(kind: str, batch: int, length: int) -> Tensor:
    execute = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "one":
        execute[torch.randint(batch, ()), torch.randint(length, ())] = True
    elif kind == "all":
        execute[:] = True
    elif kind == "random":
        execute = torch.rand(batch, length) < 0.5
    elif kind == "ragged":  # nothing in the first sequence, everything in the last
        execute = torch.rand(batch, length) < torch.linspace(0, 1, batch)[:, None]
    return execute


def run(
    function: ir.Function, values: dict[str, Tensor], types: dict[str, ir.DataType] | None = None, **attributes: float
) -> list[Tensor]:
    """Runs a model that holds nothing but one call of the function; outputs are float32, but for those of other ``types``."""
    graph = ir.Graph([], [], nodes=[], opset_imports={**OPSETS, function.domain: VERSION}, name="call")
    builder = GraphBuilder(graph)
    inputs = {}
    for name, value in values.items():  # MatMulNBits wants to know a bias's size
        shape = list(value.shape) if name.endswith("_bias") else [None] * value.ndim
        inputs[name] = builder.input(name, TYPES[value.dtype], shape)
    kinds = [(types or {}).get(str(output.name), ir.DataType.FLOAT) for output in function.outputs]
    outputs = [ir.Value(name=f"out{i}", type=ir.TensorType(kind)) for i, kind in enumerate(kinds)]
    builder.call(function, *(inputs.get(value.name) for value in function.inputs), _outputs=outputs, **attributes)
    graph.outputs.extend(outputs)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=11, functions=[function]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()})
    return [torch.from_numpy(result) for result in results]


def quantised(x: dict[str, Tensor], method: str | None) -> tuple[dict[str, Tensor], dict[str, dict[str, int]] | None]:
    """Quantises the weights among a unit's inputs, in place to what they then are; returns the inputs, and the attributes."""
    if method is None:
        return dict(x), None
    int4, inputs, attributes = Int4(method, accuracy_level=1), dict(x), {}
    for name in [name for name in x if name.endswith("_weight")]:
        projection, packed = name.removesuffix("_weight"), quantise(x[name].T, int4)
        x[name] = packed.dequantised().T
        inputs |= {f"{projection}_{part}": tensor for part, tensor in packed.parts().items()}
        attributes[projection] = int4.attributes(*x[name].T.shape)
    return inputs, attributes


def quantised_experts(
    x: dict[str, Tensor], method: str | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, int]] | None]:
    """The same of a mixture's inputs, all experts' weights ``[E, out, in]`` in one; those that score them stay as they are."""
    if method is None:
        return dict(x), None
    int4, inputs = Int4(method, accuracy_level=1), dict(x)
    for projection in MOE_PROJECTIONS:
        packed = [quantise(weight, int4) for weight in x[f"{projection}_weight"]]
        x[f"{projection}_weight"] = torch.stack([one.dequantised() for one in packed])
        for part in packed[0].parts():
            stacked = torch.stack([one.parts()[part] for one in packed])
            inputs[f"{projection}_{part}"] = stacked.flatten(2) if part == "weight" else stacked
    return inputs, dict.fromkeys(MOE_PROJECTIONS, int4.expert_attributes)


def added(y: Tensor, x: dict[str, Tensor], factor: float) -> Tensor:
    """What follows a unit."""
    return factor * (F.rms_norm(y, y.shape[-1:], x["post_norm"], EPSILON) if "post_norm" in x else y)

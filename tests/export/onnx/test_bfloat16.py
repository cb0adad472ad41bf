"""A bfloat16 model runs on GPUs alone; without one, types are checked, and that CUDA has a kernel for every operator."""

from collections import defaultdict

import numpy as np
import onnx
import pytest
import torch
from models import random_routing, save_random
from onnx.inliner import inline_local_functions

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel

# Operators of opset 24 with a bfloat16 kernel in the CUDA provider of ONNX Runtime 1.31, from its kernel registry. CastLike
# becomes Cast when the model is loaded.
ON_CUDA = {
    *(
        "Abs",
        "Add",
        "Attention",
        "Cast",
        "CastLike",
        "Concat",
        "Cos",
        "Div",
        "Expand",
        "Flatten",
        "Gather",
        "GatherND",
        "Gelu",
        "Gemm",
        "Identity",
        "MoE",
    ),
    *(
        "GroupQueryAttention",
        "Identity",
        "If",
        "MatMul",
        "MatMulNBits",
        "Mul",
        "RMSNormalization",
        "ReduceSum",
        "Reshape",
        "RotaryEmbedding",
        "ScatterND",
        "Tanh",
    ),
    *("Shape", "Sigmoid", "Sin", "Slice", "Squeeze", "Sub", "TensorScatter", "Transpose", "Unsqueeze", "Where"),
}
BFLOAT16 = onnx.TensorProto.BFLOAT16


def operators(model: onnx.ModelProto) -> set[str]:
    """Returns the operators that take a bfloat16 tensor, functions inlined."""
    typed = onnx.shape_inference.infer_shapes(inline_local_functions(model), strict_mode=True)
    found = defaultdict(set)

    def walk(graph: onnx.GraphProto, types: dict[str, int]) -> dict[str, int]:
        values = [*graph.input, *graph.value_info, *graph.output]
        types = types | {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        types = {name: kind for name, kind in types.items() if kind}
        for node in graph.node:
            found[node.op_type] |= {types[name] for name in node.input if name}
            branches = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
            inside = [walk(branch, types) for branch in branches]
            # onnx does not know com.microsoft's operators, nor what follows them; theirs have the type of the first input.
            for index, name in enumerate(node.output):
                if node.op_type == "Constant":
                    types.setdefault(name, onnx.TensorProto.INT64)  # what is not, is typed
                else:
                    known = inside[0][branches[0].output[index].name] if inside else types[node.input[0]]
                    types.setdefault(name, known)
        return types

    walk(typed.graph, {})
    return {operator for operator, types in found.items() if BFLOAT16 in types}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma2", "olmo2", "granite", "qwen3_moe"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp(request.param)
    save_random(request.param, path)
    return Checkpoint.open(str(path))


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
@pytest.mark.parametrize("logits", ["all", "last"])
def test_every_operator_has_a_kernel(logits, kv_cache, checkpoint, tmp_path):
    routing = random_routing(checkpoint, kv_cache=kv_cache)
    write(checkpoint, routing, tmp_path, "m.onnx", torch.bfloat16, logits=logits)
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    model = onnx.load(tmp_path / "m.onnx")
    used = operators(model)
    assert {"MatMul", "Attention", "ScatterND", "RMSNormalization"} <= used <= ON_CUDA
    floats = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert floats["past_key_values.0.key"] == floats["present.0.key"] == BFLOAT16
    assert floats["routing_threshold"] == floats["logits"] == onnx.TensorProto.FLOAT  # numpy has no bfloat16


def test_weights_are_rounded(checkpoint, tmp_path):
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx", torch.bfloat16)
    with pytest.raises(UserError, match="is bfloat16, which ONNX Runtime runs on GPUs alone: convert with --dtype"):
        OnnxModel.load(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    written = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = checkpoint.read(name).bfloat16().float().T.numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(written[name]).astype(np.float32), expected)
    assert {tensor.data_type for key, tensor in written.items() if ".router." in key} == {onnx.TensorProto.FLOAT}

"""What ONNX Runtime's CUDA provider is slow at, or cannot do without cuDNN, and what a graph can be held to without a GPU."""

import math
from itertools import product

import onnx_ir as ir
import pytest
import torch
from models import random_routing, save_random
from onnx_reference import Batch, profile

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel

NEEDS_CUDNN = {
    "ArgMax",
    "ArgMin",
    "Conv",
    "LogSoftmax",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "Softmax",
}


@pytest.fixture(
    scope="module", ids="-".join, params=product(["llama", "gemma2", "phi3-long", "qwen3_moe"], ["full", "strict"])
)
def half(request, tmp_path_factory) -> OnnxModel:
    """A float16 model."""
    family, kv_cache = request.param
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("onnx")
    save_random(family, base)
    checkpoint = Checkpoint.open(str(base))
    routing = random_routing(checkpoint, kv_cache=kv_cache)
    write(checkpoint, routing, folder, "m.onnx", dtype=torch.float16, logits="last", trace=True)
    return OnnxModel.load(folder, threads=1, library=False)


def test_no_operator_needs_cudnn(half):
    model = ir.load(half.path)
    used = {
        node.op_type
        for part in (model.graph, *model.functions.values())
        for node in ir.traversal.RecursiveGraphIterator(part)
    }
    assert {"MatMul", "NonZero", "TopK"} <= used
    assert not used & NEEDS_CUDNN


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_that_are_fast(batch, half, tmp_path):
    """Slots come in fours, for the attention that does not keep all scores; no product is by a vector: it would be one a token."""
    mask = torch.ones(batch, 13, dtype=torch.long)
    mask[0, :2] = 0
    (ran,) = profile(half, Batch(torch.full((batch, 13), 5), mask, [5, 6, 2]), [-math.inf], tmp_path)
    slots, ranks = [], []
    for event in ran:
        name, taken, (given, *_) = (
            event["args"][part] for part in ("op_name", "input_type_shape", "output_type_shape")
        )
        shapes = [next(iter(shape.values())) for shape in taken]
        if name == "Attention":
            slots += [shapes[1][2], shapes[3][3]]
        if name == "MatMul":
            ranks.append((len(shapes[0]), len(next(iter(given.values())))))
    assert {8, 12, 16} == set(slots)
    assert ranks
    assert all(before == after for before, after in ranks)

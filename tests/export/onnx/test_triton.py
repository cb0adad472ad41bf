"""What Triton is told of a model's inputs and outputs; tests/interop holds all of it against Triton's own schema."""

import onnx
import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import triton, write


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "FP32"), (torch.float16, "FP16")])
def test_tensors(dtype, kind, tmp_path):
    save_random("llama-bias", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx", dtype=dtype)
    text = triton.config(onnx.load(tmp_path / "m.onnx", load_external_data=False), "m.onnx")
    said = [line.strip().removesuffix(",") for line in text.splitlines()]
    for line in (
        '{ name: "input_ids", data_type: TYPE_INT64, dims: [ -1, -1 ] }',
        f'{{ name: "past_key_values.0.key", data_type: TYPE_{kind}, dims: [ -1, 2, -1, 16 ] }}',
        '{ name: "routing_threshold", data_type: TYPE_FP32, dims: [ 1 ], optional: true }',
        f'{{ name: "logits", data_type: TYPE_{kind}, dims: [ -1, -1, 131 ] }}',
        '{ name: "routing_saved", data_type: TYPE_FP32, dims: [ 1 ] }',
    ):
        assert line in said

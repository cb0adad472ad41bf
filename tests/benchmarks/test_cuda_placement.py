"""What ONNX Runtime's CUDA provider makes of a model. Needs onnxruntime-gpu in the folder that IR_ONNXRUNTIME_GPU names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write

FOLDER = os.environ.get("IR_ONNXRUNTIME_GPU")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_placement.py"


@pytest.mark.skipif(FOLDER is None, reason="IR_ONNXRUNTIME_GPU names no folder of onnxruntime-gpu")
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3-long", "olmo2"])
@pytest.mark.parametrize("kv_cache", ["full", "strict"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_shapes_are_left_to_the_cpu(dtype, kv_cache, family, tmp_path):
    save_random(family, tmp_path / "base")
    checkpoint, folder = Checkpoint.open(str(tmp_path / "base")), tmp_path / "onnx"
    folder.mkdir()
    write(checkpoint, random_routing(checkpoint, kv_cache=kv_cache), folder, "m.onnx", dtype)
    command = [sys.executable, SCRIPT, folder / "m.onnx", "--onnxruntime", FOLDER]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (on_cpu,) = [line for line in said if line.startswith("on the CPU: ")]
    kinds = {part.split()[1] for part in on_cpu.removeprefix("on the CPU: ").split(", ")}
    assert kinds <= {*("And", "Cast", "Concat", "Equal", "Greater", "LessOrEqual", "Mod", "Neg", "Squeeze", "Sub")}
    # How long the longest of several texts is, decides a shape; and a constant is read on both sides.
    copied = {line.rpartition("_inlfunc_")[2] for line in said if line.startswith("  Memcpy")}
    assert all("const_0" in name or "executed.several" in name for name in copied)
    (step,) = [line for line in said if line.startswith("a step: ")]
    # Of one text's step: four inputs there, logits and what was saved back; and how many tokens execute, once a unit.
    assert "4 copies host to device" in step
    assert f"{2 + 2 * checkpoint.config.num_hidden_layers} copies device to host" in step

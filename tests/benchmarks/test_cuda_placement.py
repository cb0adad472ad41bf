"""What ONNX Runtime's CUDA provider makes of a model, by a stand-in for CUDA.

All of it needs onnxruntime-gpu in the folder that IR_ONNXRUNTIME_GPU names; a part runs wherever one is installed, with CUDA's
headers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from models import CONFIGS, random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4

INSTALLED = Path(onnxruntime.__file__).parents[1]
NAMED = os.environ.get("IR_ONNXRUNTIME_GPU")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_placement.py"
needs_named = pytest.mark.skipif(NAMED is None, reason="IR_ONNXRUNTIME_GPU names no folder of onnxruntime-gpu")
needs_provider = pytest.mark.skipif(
    not (
        (NAMED or (INSTALLED / "onnxruntime/capi/libonnxruntime_providers_cuda.so").exists())
        and Path("/usr/local/cuda/include/cuda_runtime.h").exists()
        and all(map(shutil.which, ("g++", "nm")))
    ),
    reason="no onnxruntime-gpu is installed, or no g++ or headers of CUDA",
)


def said(model: Path, *options: str) -> list[str]:
    command = [sys.executable, SCRIPT, model, "--onnxruntime", NAMED or INSTALLED, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@needs_named
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3-long", "olmo2"])
@pytest.mark.parametrize("kv_cache", ["full", "strict"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_shapes_are_left_to_the_cpu(dtype, kv_cache, family, tmp_path):
    save_random(family, tmp_path / "base")
    checkpoint, folder = Checkpoint.open(str(tmp_path / "base")), tmp_path / "onnx"
    folder.mkdir()
    write(checkpoint, random_routing(checkpoint, kv_cache=kv_cache), folder, "m.onnx", dtype)
    lines = said(folder / "m.onnx")
    (on_cpu,) = [line for line in lines if line.startswith("on the CPU: ")]
    kinds = {part.split()[1] for part in on_cpu.removeprefix("on the CPU: ").split(", ")}
    assert kinds <= {*("And", "Cast", "Concat", "Equal", "Greater", "LessOrEqual", "Mod", "Neg", "Squeeze", "Sub")}
    # How long the longest of several texts is, decides a shape; and a constant is read on both sides.
    copied = {line.rpartition("_inlfunc_")[2] for line in lines if line.startswith("  Memcpy")}
    assert all("const_0" in name or "executed.several" in name for name in copied)
    (step,) = [line for line in lines if line.startswith("a step: ")]
    # Of one text's step: four inputs there, logits and what was saved back; and how many tokens execute, once a unit.
    assert "4 copies host to device" in step
    assert f"{2 + 2 * checkpoint.config.num_hidden_layers} copies device to host" in step


@needs_provider
@pytest.mark.parametrize(("int4", "executed"), [(None, "0"), (Int4(), "0"), (Int4("rtn_asym"), "1")])
def test_a_mixture_of_experts_runs_for_any_number_of_tokens(int4, executed, tmp_path, monkeypatch):
    """Its kernels check what they are called with before they launch anything: there has to be a token, and widths of 64."""
    monkeypatch.setattr(CONFIGS["qwen3_moe"], "moe_intermediate_size", 64)
    save_random("qwen3_moe", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx", torch.float16, int4=int4)
    lines = said(tmp_path / "m.onnx", "--executed", executed)
    (on_gpu,) = [line for line in lines if line.startswith("on the GPU: ")]
    assert (" 3 MoE" if int4 is None else " 3 QMoE") in on_gpu
    assert any(line.startswith("a step: ") for line in lines)

"""Calibration and exported checkpoints on a GPU, without one: nothing stays behind on the CPU, and the results are the CPU's."""

import subprocess
import sys
from pathlib import Path


def test_as_on_the_cpu(tmp_path):
    """All recipes, families that differ, and what is exported of every family."""
    worker = Path(__file__).with_name("gpu_worker.py")
    done = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_forgotten_is_found():
    """The GPU that is none refuses what a GPU would."""
    program = """
import torch
from fake_gpu import GPU, gpu
here = torch.ones(3, 4)
def refused(mixed):
    try: mixed()
    except RuntimeError as error: return "same device" in str(error)
    return False
with gpu():
    there = here.to("gpu")
    assert there.device == GPU and (there @ there.T).device == GPU and there.cpu().device.type == "cpu"
    assert refused(lambda: here + there) and refused(lambda: here.add_(there)) and refused(lambda: here[there.long()])
    assert refused(lambda: torch.cat([here, there])) and refused(lambda: torch.nn.functional.linear(there, here))
    assert torch.equal((there + 1 + torch.tensor(2.0)).cpu(), here + 3) and there.sum().item() == 12
    here[0] = 2 * there[1]
    assert here[0].tolist() == [2.0] * 4 and torch.zeros(2, device="gpu").device == GPU
"""
    worker = [sys.executable, "-c", program]
    done = subprocess.run(worker, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]

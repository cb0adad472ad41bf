"""Two processes, with and without FSDP, end where one process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint

WORKER = Path(__file__).with_name("endtoend_worker.py")
ROOT = Path(__file__).parents[3]


def start(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What one process and two processes ended with."""
    path = tmp_path_factory.mktemp("processes")
    save_random("llama", path / "model")
    random_routing(Checkpoint.open(str(path / "model"))).save(path / "routing.safetensors")
    inputs = [str(WORKER), str(path / "model"), str(path / "routing.safetensors")]
    start([*inputs, str(path / "one")])
    start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *inputs, str(path / "two")])
    return torch.load(path / "one"), torch.load(path / "two")


@pytest.mark.parametrize(("way", "tolerance"), [("data", 1e-4), ("fsdp", 1e-3)])
def test_two_processes_end_where_one_does(ends, way, tolerance):
    one, two = ends
    assert one["data"].keys() == two[way].keys()
    for run, tensors in one["data"].items():
        for alone, shared in zip(tensors, two[way][run], strict=True):
            torch.testing.assert_close(
                shared, alone, atol=tolerance, rtol=tolerance, msg=lambda text, run=run: f"{run}: {text}"
            )


def test_fsdp_really_shards_the_frozen_weights(ends):
    assert ends[1]["sharded"]["every pass"][0]

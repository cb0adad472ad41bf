"""A model in the ONNX runtime, and its transformers original."""

import numpy as np
import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers model, folder of its export) with a sliding window, which caches find hardest."""
    path = tmp_path_factory.mktemp("base")
    torch.set_num_threads(1)
    model = save_random("mistral-sliding", path)
    checkpoint = Checkpoint.open(str(path))
    folder = tmp_path_factory.mktemp("onnx")
    write(checkpoint, random_routing(checkpoint), folder, "ir-tiny.onnx")
    return model, folder


@pytest.fixture
def model(base):
    return OnnxModel.load(base[1], threads=1)


@pytest.fixture
def prompt():
    return np.random.default_rng(3).integers(3, 131, (1, 9))

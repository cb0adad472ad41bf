"""Fixtures shared by all tests."""

import pytest
import torch
from models import CONFIGS, random_routing, save_random
from trained import Converted

from ir_convert.checkpoint import Checkpoint

# The models are tiny: more threads cost more than they give, a hundredfold where the cores are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=list(CONFIGS))
def random_model(request, tmp_path_factory):
    """(family name, transformers model, checkpoint, routing), for every family."""
    path = tmp_path_factory.mktemp(request.param)
    model = save_random(request.param, path)
    checkpoint = Checkpoint.open(str(path))
    return request.param, model, checkpoint, random_routing(checkpoint)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The tiny trained model, converted by the command line: see ``trained.Converted``."""
    return Converted.make(tmp_path_factory.mktemp("converted"))

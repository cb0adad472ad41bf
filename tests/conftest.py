"""Fixtures shared by all tests."""

import os

import pytest
import torch
from models import CONFIGS, make_random
from trained import Converted

# Tests are of the models' own functions, but for those that ask for the native kernels: a built library must not creep in.
os.environ.setdefault("IR_CONVERT_OPS", "")
# The models are tiny: more threads cost more than they give, a hundredfold where the cores are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=list(CONFIGS))
def random_model(request, tmp_path_factory):
    """(family name, transformers model, checkpoint, routing), for every family."""
    return make_random(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The tiny trained model, converted by the command line: see ``trained.Converted``."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist every process has a folder of its own in a common one.
    return Converted.shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted")

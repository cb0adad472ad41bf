"""Fixtures shared by all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from models import CONFIGS, random_routing, save_random

from ir_convert.checkpoint import Checkpoint


@pytest.fixture(scope="session", params=list(CONFIGS))
def random_model(request, tmp_path_factory):
    """(family name, transformers model, checkpoint, routing), for every family."""
    path = tmp_path_factory.mktemp(request.param)
    model = save_random(request.param, path)
    checkpoint = Checkpoint.open(str(path))
    return request.param, model, checkpoint, random_routing(checkpoint)

"""The model that most of these tests calibrate."""

import pytest
from models import save_random

from ir_convert.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """A random llama."""
    path = tmp_path_factory.mktemp("calibrated") / "model"
    save_random("llama", path)
    return Checkpoint.open(str(path))

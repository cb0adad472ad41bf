"""An exported checkpoint of every family, and a model to export."""

import pytest
from models import random_routing, save_random
from routed_models import Exported, export

from ir_convert.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def exported(random_model, tmp_path_factory) -> Exported:
    return export(random_model, tmp_path_factory.mktemp(f"ir-{random_model[0]}"))


@pytest.fixture(autouse=True)
def _fresh(request):
    """Every test starts at the sparsity that was asked for."""
    if "exported" in request.fixturenames:
        exported = request.getfixturevalue("exported")
        exported.set_threshold(exported.routing.threshold)
        exported.model.set_attn_implementation(exported.kernels[0])


@pytest.fixture
def llama(tmp_path):
    """(base model, checkpoint, routing) of a tied llama, in a folder that the test may change."""
    base = save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    return base, checkpoint, random_routing(checkpoint)

"""An exported checkpoint of every family."""

import pytest
from routed_models import Exported, dense_reference

from ir_convert.export.hf import load, write


@pytest.fixture(scope="session")
def exported(random_model, tmp_path_factory) -> Exported:
    name, base, checkpoint, routing = random_model
    folder = tmp_path_factory.mktemp(f"ir-{name}")
    write(checkpoint, routing, folder)
    model = load(folder).eval()
    return Exported(name, base, model, dense_reference(base, routing), checkpoint, routing, folder)


@pytest.fixture(autouse=True)
def _fresh(request):
    """Every test starts at the sparsity that was asked for."""
    if "exported" in request.fixturenames:
        exported = request.getfixturevalue("exported")
        exported.set_threshold(exported.routing.threshold)
        exported.model.set_attn_implementation(exported.kernels[0])

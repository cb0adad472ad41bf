"""An exported checkpoint of every family."""

import pytest
from routed_models import Exported, export


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

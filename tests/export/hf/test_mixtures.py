"""Checkpoints of mixtures of experts."""

import pytest
import transformers
from models import EVERY, edit, random_routing, save_random
from routed_models import tokens, write_and_load

from ir_convert.checkpoint import Checkpoint
from ir_convert.families import FAMILIES

NAMES = [name for name in EVERY if FAMILIES[EVERY[name].model_type].mlp.experts]


@pytest.mark.parametrize("name", NAMES)
def test_trained_for_the_scores_of_experts(name, tmp_path):
    """Approximated tokens have none: what is written does not give them, and says which transformers it needs."""
    save_random(name, tmp_path / "base")
    edit(tmp_path / "base" / "config.json", output_router_logits=True)
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    model = write_and_load(checkpoint, random_routing(checkpoint), tmp_path / "ir")
    assert model(tokens(1, 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="approximated tokens have no scores of experts"):
        model(tokens(1, 5), output_router_logits=True)
    assert ("transformers 4.57 and 5," in (tmp_path / "ir" / "README.md").read_text()) == (name == "qwen3_moe")


def test_there_are_some():
    assert {"qwen3_moe", "mixtral", "olmoe"} - set(NAMES) == (
        {"mixtral", "olmoe"} if transformers.__version__.startswith("4.") else set()
    )

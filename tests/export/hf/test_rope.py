"""Rotary embedding in either spelling of configurations: that of transformers 4, and that of 5."""

import json

import pytest
import torch
from models import random_routing, save_random
from routed_models import tokens, write_and_load
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load
from ir_convert.export.hf.writer import ROPE
from ir_convert.rope import all_rope_parameters


@pytest.mark.parametrize("spelling", [4, 5])
@torch.no_grad()
def test_rope_in_the_spelling_of_either_transformers(llama, tmp_path, spelling):
    _, checkpoint, routing = llama
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path = checkpoint.path / "config.json"
    plain = json.loads(path.read_text("utf-8"))
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        plain.pop(name, None)
    four = {"rope_theta": 5000.0, "rope_scaling": scaling}
    path.write_text(json.dumps(plain | four), "utf-8")
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    five = {"rope_parameters": {"rope_theta": 5000.0, **scaling}}
    path.write_text(json.dumps(plain | (four if spelling == 4 else five)), "utf-8")
    model = write_and_load(Checkpoint.open(str(checkpoint.path)), routing, tmp_path / "ir")
    model.save_pretrained(tmp_path / "again")
    ids = tokens(1, 60)
    for loaded in (model, load(tmp_path / "again").eval()):
        loaded.set_sparsity(0)
        assert_close(loaded(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)
    values = json.loads((tmp_path / "ir" / "config.json").read_text("utf-8"))
    assert (values["rope_theta"], values["rope_scaling"]) == (5000.0, scaling)
    assert values["rope_parameters"] == {"rope_theta": 5000.0, **scaling}


ROPE_OF_VERSION_4 = {
    "gemma3": {"rope_theta": 5000.0, "rope_local_base_freq": 70.0},
    "phi3": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "phi3-long": {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 2.0, 4.0, 9.0],
        },
    },
}


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("name", ROPE_OF_VERSION_4)
@torch.no_grad()
def test_rope_of_other_families_in_either_spelling(name, spelling, tmp_path):
    """Two bases, heads rotated in part, and factors that depend on the length."""
    base = save_random(name, tmp_path / "base")
    path, ids = tmp_path / "base" / "config.json", tokens(1, 60)
    five = all_rope_parameters(base.config)
    plain = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in ROPE}
    written = {"rope_parameters": five} if spelling == 5 else ROPE_OF_VERSION_4[name]
    path.write_text(json.dumps(plain | written), "utf-8")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    model = write_and_load(checkpoint, random_routing(checkpoint), tmp_path / "ir")
    model.save_pretrained(tmp_path / "again")
    for loaded in (model, load(tmp_path / "again").eval()):
        loaded.set_sparsity(0)
        assert_close(loaded(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)
    values = json.loads((tmp_path / "ir" / "config.json").read_text("utf-8"))
    assert values["rope_parameters"] == five
    assert {key: values[key] for key in ROPE if key in values} == {"rope_parameters": five} | ROPE_OF_VERSION_4[name]

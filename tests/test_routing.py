"""The routing file: round trip, the dial, damage."""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ir_convert.curve import within_reach
from ir_convert.errors import UserError
from ir_convert.routing import Curve, Routing


@pytest.mark.parametrize("missing", [[], [(1, "attention")], [(layer, "attention") for layer in range(3)]])
def test_round_trip(random_model, tmp_path, missing):
    _, _, _, routing = random_model
    units = {key: unit for key, unit in routing.units.items() if key not in missing}
    lora = {
        "model.layers.0.mlp.up_proj.weight": (torch.randn(2, 48), torch.randn(80, 2)),
        "model.layers.2.self_attn.q_proj.weight": (torch.randn(3, 48), torch.randn(48, 3)),
    }
    routing = replace(routing, units=units, lora=lora)
    routing.save(tmp_path / "r.safetensors")
    assert os.listdir(tmp_path) == ["r.safetensors"]
    again = Routing.load(tmp_path / "r.safetensors")
    assert again.metadata == routing.metadata
    assert again.curve == routing.curve
    assert list(again.units) == list(routing.units)
    for key, unit in routing.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(again.units[key].tensors()[name], tensor)
    assert set(again.lora) == set(lora)
    for name, factors in lora.items():
        assert all(map(torch.equal, again.lora[name], factors))
    assert again.kv_cache == "full"
    assert replace(again, metadata={"kv_cache": "strict"}).kv_cache == "strict"


def test_low_rank_changes_are_folded_into_what_is_read(random_model):
    _, _, checkpoint, _ = random_model
    name, other = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2))
    outputs, inputs = checkpoint.read(name).shape
    a, b = torch.randn(2, inputs), torch.randn(outputs, 2)
    folded = checkpoint.with_lora({name: (a, b)})
    torch.testing.assert_close(folded.read(name), checkpoint.read(name) + b @ a)
    torch.testing.assert_close(folded.read_layer(1)["self_attn.o_proj.weight"], checkpoint.read(name) + b @ a)
    assert folded.read(other).equal(checkpoint.read(other))


@given(st.floats(0.01, 0.8), st.floats(0.01, 0.8))
def test_more_sparsity_higher_threshold(one, other):
    curve = Curve([0.0, 0.1, 0.5, 0.8], [-9.0, -3.0, 0.0, 7.0])
    low, high = sorted([one, other])
    assert curve.at(low) <= curve.at(high)


def test_ends_of_the_dial():
    curve = Curve([0.0, 0.8], [-9.0, 7.0])
    assert curve.at(0) == -math.inf
    assert curve.at(0.8) == 7.0
    with pytest.raises(UserError, match=r"0\.9 is out of reach.*0\.800"):
        curve.at(0.9)


def test_damaged_and_foreign_files(random_model, tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        Routing.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        Routing.load(path)
    _, _, checkpoint, routing = random_model
    with pytest.raises(UserError, match="not a routing file"):
        Routing.load(checkpoint.path / "model.safetensors")

    routing.save(path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    (first, *_) = {name.rsplit(".", 2)[0] for name in tensors if name.startswith("layers.")}
    for name, damaged in (
        ("curve.sparsity", None),
        (f"{first}.router.hidden", None),
        (f"{first}.forecaster.up", tensors[f"{first}.forecaster.up"][:-1].contiguous()),
        (f"{first}.router.out_bias", torch.zeros(2)),
        ("elsewhere", torch.zeros(2)),
    ):
        changed = {key: tensor for key, tensor in (tensors | {name: damaged}).items() if tensor is not None}
        save_file(changed, path, metadata=header)
        with pytest.raises(UserError, match=r"is damaged.*calibrate again"):
            Routing.load(path)
    save_file(tensors, path, metadata=header | {"format": "1"})
    with pytest.raises(UserError, match="is not a routing file of format 2: name one that this version"):
        Routing.load(path)


def test_a_routing_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("ir_convert.routing.sync", lambda path: synced.append((path.name, path.exists())))
    Routing({}, Curve([0.1], [1.0])).save(tmp_path / "r.safetensors")
    assert synced == [("r.safetensors.tmp", True)]


def test_what_a_message_names_is_within_reach():
    assert within_reach(0.7998) == 0.799
    Curve([0.1, 0.7998], [-1.0, 1.0]).at(within_reach(0.7998))

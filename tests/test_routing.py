"""The routing file: round trip, the dial, damage."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir_convert.errors import UserError
from ir_convert.routing import Curve, Routing


def test_round_trip(random_model, tmp_path):
    _, _, _, routing = random_model
    routing.save(tmp_path / "r.safetensors")
    assert os.listdir(tmp_path) == ["r.safetensors"]
    again = Routing.load(tmp_path / "r.safetensors")
    assert again.metadata == routing.metadata
    assert again.curve == routing.curve
    assert list(again.units) == list(routing.units)
    for key, unit in routing.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(again.units[key].tensors()[name], tensor)


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
    _, _, checkpoint, _ = random_model
    with pytest.raises(UserError, match="not a routing file"):
        Routing.load(checkpoint.path / "model.safetensors")

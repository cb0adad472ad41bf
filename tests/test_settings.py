"""The settings that a routing was measured under, and which of them have changed since."""

import copy
import json

import pytest
from models import EVERY

from ir_convert.settings import changes, settings


@pytest.mark.parametrize("name", EVERY)
def test_what_a_file_keeps_is_what_the_configuration_says(name):
    kept = json.loads(json.dumps(settings(EVERY[name])))
    assert {"rms_norm_eps", "num_attention_heads"} < set(kept)
    assert changes(kept, EVERY[name]) == []
    other = copy.deepcopy(EVERY[name])
    other.rms_norm_eps, other.vocab_size = 0.25, 7
    assert changes(kept, other) == [f"rms_norm_eps was {kept['rms_norm_eps']}, is 0.25"]


def test_each_kind_of_layer_and_long_lists():
    kept = settings(EVERY["gemma3"])
    assert kept["rope.full_attention.rope_theta"] != kept["rope.sliding_attention.rope_theta"]
    (change,) = changes(kept | {"layer_types": ["full_attention"] * 3}, EVERY["gemma3"])
    assert change == "layer_types was [full_attention, ...], is [sliding_attention, ...]"


def test_biases():
    kept = settings(EVERY["seed_oss"])
    other = copy.deepcopy(EVERY["seed_oss"])
    other.mlp_bias, other.attention_bias = True, False
    assert changes(kept, other) == ["attention_bias was True, is False", "mlp_bias was False, is True"]
    for name in ("attention_bias", "mlp_bias", "attention_out_bias"):
        kept.pop(name)  # as in files of before
    other.mlp_bias = False
    assert changes(kept, other) == []

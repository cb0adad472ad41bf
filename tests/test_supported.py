"""What a configuration may ask for, what it may not, and what the ONNX graph does not build."""

import copy
import re

import pytest
from models import CONFIGS, EVERY
from transformers import Gemma3TextConfig, GPT2Config, Llama4Config, LlamaConfig, OlmoeConfig, Qwen3MoeConfig

from ir_convert.errors import UserError
from ir_convert.export.onnx import check_model
from ir_convert.export.onnx.int4 import Int4
from ir_convert.rope import all_rope_parameters
from ir_convert.supported import require_supported


def changed(config, **values):
    for name, value in values.items():
        setattr(config, name, value)
    return config


ROPE = {"rope_type": "spiral", "rope_theta": 10000.0}
THETA = {"rope_type": "default", "rope_theta": "10000"}
KINDS = {
    "full_attention": {"rope_type": "longrope", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "model family 'gpt2' is not known; known families: llama, .*qwen3_moe"),
        (
            Llama4Config(),
            "model family 'llama4' is not a text model, and its language model of family 'llama4_text' is not",
        ),
        (changed(LlamaConfig(), hidden_act="relu2"), r"activation 'relu2' \(hidden_act\) in the MLP is not supported"),
        (
            changed(Gemma3TextConfig(), hidden_activation="gelu"),
            r"activation 'gelu' \(hidden_activation\) .*silu or gelu_pytorch_tanh",
        ),
        (
            changed(LlamaConfig(), quantization_config={"quant_method": "fp8"}),
            "quantised by 'fp8' are not read: convert",
        ),
        (changed(Gemma3TextConfig(), use_bidirectional_attention=True), "use_bidirectional_attention is true"),
        (
            changed(LlamaConfig(), rope_parameters=ROPE, rope_scaling=ROPE),
            "type 'spiral' .* is not supported: use default",
        ),
        (
            changed(LlamaConfig(), rope_parameters=THETA, rope_theta="10000"),
            "rope_theta is '10000' in config.json: a positive number is expected",
        ),
        (changed(LlamaConfig(), num_key_value_heads=0), "num_key_value_heads is 0 in config.json"),
        (
            changed(LlamaConfig(), num_key_value_heads=5),
            "num_attention_heads 32 is no multiple of num_key_value_heads 5",
        ),
        (
            changed(EVERY["olmo3"].__class__(), layer_types=["full_attention"]),
            "layer_types has 1 entries for 32 layers",
        ),
        (
            changed(EVERY["exaone4"].__class__(), layer_types=["linear_attention"] * 32),
            "layers of type 'linear_attention' .* are not supported",
        ),
        (
            changed(EVERY["olmo3"].__class__(), sliding_window=None),
            "sliding_window is None, and layer_types has sliding",
        ),
        (changed(EVERY["exaone4"].__class__(), sliding_window=0), "sliding_window is 0, and layer_types has sliding"),
        (
            changed(LlamaConfig(), rope_parameters=KINDS),
            "names kinds of layers: .* in models of type gemma3_text and olmo3",
        ),
        (
            changed(Gemma3TextConfig(), rope_parameters={"full_attention": ROPE}),
            "names kinds of layers: .* are expected",
        ),
        (changed(EVERY["olmo3"].__class__(), rope_parameters=KINDS), "has rope_type 'longrope': that is not supported"),
        (changed(CONFIGS["granite"].__class__(), residual_multiplier=0), "residual_multiplier is 0"),
        (OlmoeConfig(num_experts=4), "num_experts_per_tok is 8, and there are 4 experts: correct config.json"),
        (OlmoeConfig(clip_qkv=8.0), "clip_qkv is 8.0: queries, keys and values that are clipped"),
        (Qwen3MoeConfig(mlp_only_layers=[0]), re.escape("mlp_only_layers is [0]: models in which some layers")),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step is 2: models in which some layers"),
    ],
)
def test_one_clear_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        require_supported(config)
    assert "\n" not in str(caught.value)


def test_settings_of_all_layers_beside_those_of_each_kind():
    """transformers puts the latter beside what it finds; they alone are read."""
    config = copy.deepcopy(EVERY["olmo3"])
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0} | all_rope_parameters(config)
    require_supported(config)
    assert all_rope_parameters(config) == all_rope_parameters(EVERY["olmo3"])


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_supported(name):
    require_supported(EVERY[name])


@pytest.mark.parametrize("name", EVERY)
def test_onnx_builds_every_family(name):
    check_model(EVERY[name], Int4())


@pytest.mark.parametrize(
    ("config", "int4", "message"),
    [
        (
            LlamaConfig(rope_theta=1e4, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            None,
            r"does not support position embeddings that follow the text's length \(rope_type 'dynamic'\); a checkpoint folder",
        ),
        (Qwen3MoeConfig(hidden_act="gelu_pytorch_tanh"), None, "experts with activation 'gelu_pytorch_tanh'"),
        (Qwen3MoeConfig(), Int4("hqq"), "whole zero points: choose rtn or rtn_asym or k_quant$"),
        (Qwen3MoeConfig(hidden_size=80), Int4(), "whole blocks of 32 weights, and the hidden size is 80: leave --int4"),
        (Qwen3MoeConfig(moe_intermediate_size=48), Int4("rtn_asym"), "and the experts' width is 48"),
    ],
)
def test_what_onnx_does_not_build(config, int4, message):
    with pytest.raises(UserError, match=message) as caught:
        check_model(config, int4)
    assert "\n" not in str(caught.value)

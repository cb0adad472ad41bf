"""Small random models of every family, and random routings for them."""

import json
import math
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import attention_kernel
from ir_convert.families import UNITS
from ir_convert.flops import Budget
from ir_convert.routing import Curve, Routing
from ir_convert.units import Forecaster, RoutedUnit, Router

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Frequencies below, between and above the two bounds that Llama 3 sets.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 7,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=7, head_dim=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, head_dim=16, rope_theta=5000.0, rope_scaling=LLAMA3_ROPE),
    "gemma2": Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA, rope_theta=5000.0, rope_local_base_freq=70.0),
    "phi3": Phi3Config(**SIZES, sliding_window=9, partial_rotary_factor=0.5),
    "phi3-long": Phi3Config(
        **SIZES,
        original_max_position_embeddings=128,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 9.0]},
    ),
    "olmo2": Olmo2Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=1.7,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **(SIZES | {"hidden_size": 128}),  # whole blocks in int4, as the experts' width is
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
}
LOCAL = {"layer_types": GEMMA["layer_types"], "sliding_window": 7}
# Put together from what those above are tested for: tests/test_relatives.py holds these against transformers.
RELATIVES: dict[str, PretrainedConfig] = {
    "seed_oss": SeedOssConfig(
        **SIZES, head_dim=16, attention_bias=True, attention_out_bias=False, attention_dropout=0.0, residual_dropout=0.0
    ),
    "gemma": GemmaConfig(**SIZES, head_dim=16, hidden_act="gelu_pytorch_tanh"),
    "olmo3": Olmo3Config(
        **SIZES,
        **LOCAL,
        rope_theta=5000.0,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "mixtral": MixtralConfig(
        **(SIZES | {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}),
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "olmoe": OlmoeConfig(
        **(SIZES | {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}),
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    ),
    "exaone4": Exaone4Config(**SIZES, **LOCAL),
    "exaone4-global": Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * 3),
}
if transformers.__version__.startswith("4."):
    del RELATIVES["mixtral"], RELATIVES["olmoe"]
EVERY = CONFIGS | RELATIVES


def edit(path: Path, **changes: object) -> None:
    """Changes settings of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_random(name: str, path: Path, seed: int = 0, max_shard_size: str = "5GB") -> PreTrainedModel:
    """Writes a random checkpoint of a configuration by its name, every parameter away from its initial 0 or 1; returns the model."""
    torch.manual_seed(seed)
    config = EVERY[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_kernel(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # A norm's weight starts at 1, or at 0 where 1 is added to it; a bias at 0.
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model.eval()


def make_random(name: str, path: Path) -> tuple[str, PreTrainedModel, Checkpoint, Routing]:
    """Writes a random checkpoint of a configuration; returns the name, the model, the checkpoint and a routing for it."""
    model = save_random(name, path)
    checkpoint = Checkpoint.open(str(path))
    return name, model, checkpoint, random_routing(checkpoint)


def random_routing(
    checkpoint: Checkpoint,
    rank: int = 5,
    width: int = 4,
    seed: int = 0,
    units: tuple[str, ...] = UNITS,
    kv_cache: str = "full",
) -> Routing:
    """Returns random forecasters and routers whose scores straddle the thresholds of their curve."""
    generator = torch.Generator().manual_seed(seed)
    d = checkpoint.config.hidden_size

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    routed = {
        (layer, unit): RoutedUnit(
            Forecaster(normal(rank, d, scale=d**-0.5), normal(rank), normal(d, rank, scale=0.4), normal(d, scale=0.1)),
            Router(normal(width, d, scale=d**-0.5), normal(width), normal(1, width, scale=3.0), normal(1, scale=0.3)),
        )
        for layer in range(checkpoint.config.num_hidden_layers)
        for unit in units
    }
    reachable = Budget.of(checkpoint.config, routed, kv_cache).reachable
    sparsity = [reachable * step / 8 for step in range(1, 9)]
    threshold = [-3.0 + 6.0 * step / 8 for step in range(1, 9)]
    metadata = {
        "sparsity": 0.4,
        "base_model": checkpoint.public_name,
        "weights_sha256": checkpoint.weights_sha256,
        "kv_cache": kv_cache,
    }
    return Routing(routed, Curve(sparsity, threshold), metadata)

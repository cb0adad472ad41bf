"""Small random models of every family, and random routings for them."""

import math
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ir_convert.checkpoint import Checkpoint
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
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=7, head_dim=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def save_random(name: str, path: Path, seed: int = 0, max_shard_size: str = "5GB") -> PreTrainedModel:
    """Writes a random checkpoint of ``CONFIGS[name]``, every parameter away from its initial 0 or 1; returns the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(float(key.endswith("norm.weight")) + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / math.sqrt(parameter.shape[1]))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model.eval()


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
        "base_model": checkpoint.name,
        "weights_sha256": checkpoint.weights_sha256,
        "kv_cache": kv_cache,
    }
    return Routing(routed, Curve(sparsity, threshold), metadata)

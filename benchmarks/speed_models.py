"""Models to time: a random checkpoint of a known shape, our routed and dense exports of it, and the other builder's.

Speed does not depend on what the weights say, as long as nothing overflows and decisions differ from token to token: so
weights are random, and routers are random functions of the hidden state whose scores are about normal, a different
distribution in every unit. One threshold then splits tokens in every unit, as it does in a calibrated model.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, PretrainedConfig

from ir_convert.calibrate.options import Options
from ir_convert.checkpoint import Checkpoint
from ir_convert.export import onnx
from ir_convert.export.onnx.int4 import Int4
from ir_convert.families import UNITS, head_dim, projection_sizes
from ir_convert.flops import Budget
from ir_convert.routing import Curve, Routing
from ir_convert.units import Forecaster, RoutedUnit, Router

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int4": torch.float32}
BUILDER = "onnxruntime_genai"


@dataclass(frozen=True)
class Shape:
    """What a Llama's speed depends on."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "small": Shape(12, 768, 2048, 12, 4, 8192),
    "small-mha": Shape(12, 768, 2048, 12, 12, 8192),
    "1B": Shape(16, 2048, 8192, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "7B": Shape(32, 4096, 11008, 32, 32, 32000),  # Llama-2-7B
    "7B-8-layers": Shape(8, 4096, 11008, 32, 32, 32000),  # a quarter of it
    "tiny": Shape(3, 64, 128, 4, 2, 256),  # for tests
}


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Checkpoint:
    """Writes a random Llama in bfloat16, one shard a layer; what is already there is used again."""
    if not (folder / "model.safetensors.index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_random(folder, shape, torch.Generator().manual_seed(seed))
    return Checkpoint.open(str(folder))


def _write_random(folder: Path, shape: Shape, generator: torch.Generator) -> None:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=16384,  # of the other builder's models: the longest text
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    if TINY.is_dir():  # the other builder copies a tokenizer; no benchmark reads it
        AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    weight_map: dict[str, str] = {}

    def random(outputs: int, inputs: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * scale / inputs**0.5).bfloat16()

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for index in range(shape.layers):
        tensors = {}
        for name, (inputs, outputs) in projection_sizes(config).items():
            module = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            tensors[f"model.layers.{index}.{module}.{name}.weight"] = random(outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = ones.clone()
        save(f"model-layer-{index:03}.safetensors", tensors)
    # Of unit size, as what layers add: tokens stay as different from each other as in a trained model.
    ends = {"model.embed_tokens.weight": random(shape.vocabulary, shape.hidden, shape.hidden**0.5)}
    if not shape.tied:
        ends["lm_head.weight"] = random(shape.vocabulary, shape.hidden)
    save("model-ends.safetensors", ends | {"model.norm.weight": ones})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_routing(config: PretrainedConfig, seed: int = 0) -> Routing:
    """Returns forecasters and routers of the sizes that a calibration would choose, with about normal scores."""
    generator, d = torch.Generator().manual_seed(seed), config.hidden_size
    rank, width = Options().settled(config).shape

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    units = {
        (layer, unit): RoutedUnit(
            Forecaster(
                *(normal(rank, d, scale=d**-0.5), normal(rank, scale=0.1)),
                *(normal(d, rank, scale=rank**-0.5), normal(d, scale=0.1)),
            ),
            Router(
                *(normal(width, d, scale=d**-0.5), normal(width, scale=0.3)),
                *(normal(1, width, scale=1.7 * width**-0.5), normal(1, scale=0.3)),
            ),
        )
        for layer in range(config.num_hidden_layers)
        for unit in UNITS
    }
    reachable = Budget.of(config, units).reachable
    curve = Curve([0.01, 0.99 * reachable], [-3.0, 3.0])  # a default for the file; thresholds are found by measuring
    return Routing(units, curve, {"sparsity": 0.5 * reachable, "base_model": "random", "weights_sha256": None})


def without_routing() -> Routing:
    """Returns the routing of a model that is not routed."""
    return Routing({}, Curve([0.0, 1.0], [0.0, 1.0]), {"sparsity": 0.0, "base_model": "random", "weights_sha256": None})


def export(checkpoint: Checkpoint, routing: Routing, folder: Path, precision: str, logits: str = "all") -> Path:
    """Writes a model with our exporter, in place of what is there; returns the model file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    int4 = Int4() if precision == "int4" else None
    onnx.write(checkpoint, routing, folder, "model.onnx", dtype=DTYPES[precision], int4=int4, logits=logits)
    return folder / "model.onnx"


def build_genai(
    checkpoint: Path, folder: Path, precision: str, provider: str, site: Path | None, logits: str = "all"
) -> Path:
    """Has onnxruntime-genai's builder write the dense model, in a process of its own; returns the model file.

    Args:
        checkpoint: the checkpoint's folder.
        folder: where to write; a model that is already there is used again.
        precision: fp32, fp16 or int4.
        provider: what the model is built for: cpu or cuda.
        logits: of all tokens, or of each sequence's last.
        site: where the package was installed (``pip install --no-deps --target``); None if it is installed as usual.

    Raises:
        RuntimeError: the builder is not installed, or failed.
    """
    if (folder / "genai_config.json").is_file():
        return folder / "model.onnx"
    environment = dict(os.environ)
    if site is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", f"{BUILDER}.models.builder", "-m", str(checkpoint), "-o", str(folder)]
    command += ["-p", precision, "-e", provider, "-c", str(folder.with_name("genai-cache"))]
    # By itself it rounds the head of an int4 model to int4 as well; ours is in int8.
    extra = ["algo_config=rtn_last"] * (precision == "int4") + ["prune_lm_head=true"] * (logits == "last")
    command += ["--extra_options", *extra] if extra else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"the builder of onnxruntime-genai did not write a model: {lines[-1]}")
    return folder / "model.onnx"


def model_facts(config: PretrainedConfig, routing: Routing) -> dict[str, float | int | bool]:
    """Returns what a result says of its model."""
    budget = Budget.of(config, routing.units)
    head = 2 * config.hidden_size * config.vocab_size
    rank, width = Options().settled(config).shape
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "rank": rank,
        "router_width": width,
        "overhead": budget.overhead_share,
        "reachable": budget.reachable,
        "head_share": head / (head + budget.dense * budget.layers),
    }

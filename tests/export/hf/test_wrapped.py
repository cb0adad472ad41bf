"""A checkpoint whose layers others have taken over: offloaded, adapted, quantized, watched."""

import copy

import pytest
import torch
from models import random_routing, save_random
from routed_models import tokens
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.quantizers.base import HfQuantizer

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write
from ir_convert.export.hf.routed_ir import Router


@torch.no_grad()
def test_offloaded(exported, tmp_path):
    """Weights come from the disk and from memory when their layer is called."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm", "lm_head"), "cpu")
    if hasattr(exported.model.model, "rotary_emb_local"):  # in version 4 of transformers
        places["model.rotary_emb_local"] = "cpu"
    places |= {"model.layers.0": "disk", "model.layers.2": "disk"}
    model = load(exported.folder, device_map=places, offload_folder=str(tmp_path)).eval()
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    ids = tokens(2, 12)
    with model.routing_statistics() as seen:
        logits = model(ids).logits
    assert 0.1 < seen.decisions < 0.9
    assert logits.equal(exported.model(ids).logits)


class Adapted(nn.Module):
    """Stands in for what peft makes of a layer: whoever reads the weight sees that of the base."""

    def __init__(self, base: nn.Linear, change: torch.Tensor) -> None:
        super().__init__()
        self.base_layer, self.change = base, change

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + F.linear(x, self.change)


class Quantized(nn.Linear):
    """Stands in for a quantized layer: its weight is no matrix to multiply by."""

    def __init__(self, base: nn.Linear, change: torch.Tensor | float = 0.0) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        values = base.weight + change
        self.scale = values.abs().amax() / 127
        self.weight = nn.Parameter((values / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def hook(linear: nn.Linear, change: torch.Tensor) -> nn.Linear:
    linear.register_forward_hook(lambda _, x, output: output + F.linear(x[0], change))
    return linear


@pytest.mark.parametrize("wrap", [Adapted, Quantized, hook])
@torch.no_grad()
def test_packed_projection_that_is_more_than_its_weight(tmp_path, wrap):
    save_random("phi3", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "ir").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "ir")
    model = load(tmp_path / "ir").eval()
    model.config.routing_threshold = 0.0
    folded, ids, generator = copy.deepcopy(model), tokens(2, 12), torch.Generator().manual_seed(0)
    for ours, theirs in zip(model.model.layers, folded.model.layers, strict=True):
        linear = ours.self_attn.qkv_proj
        change = torch.randn(linear.weight.shape, generator=generator) * 0.1
        wrapped = wrap(linear, change)
        ours.self_attn.qkv_proj = wrapped
        stored = theirs.self_attn.qkv_proj.weight
        stored.copy_(wrapped.weight * wrapped.scale if wrap is Quantized else stored + change)
    assert_close(model(ids).logits, folded(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_router_whose_last_layer_is_quantized():
    torch.manual_seed(0)
    router, h = Router(32, 8), torch.randn(3, 40, 32)
    expected = router(h)
    router.score = Quantized(router.score)
    assert_close(router(h), expected, atol=0.02, rtol=0)
    assert len(router(h).unique()) == expected.numel()


class Saved(nn.Module):
    """Stands in for what peft makes of a module that is trained beside adapters."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.trained = base, copy.deepcopy(base)

    def forward(self, *args, **kwargs):
        return self.trained(*args, **kwargs)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("wrapped", ["post_attention_layernorm", "mlp"])
def test_norm_that_is_trained_in_a_wrapper(tmp_path, family, wrapped):
    save_random(family, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "ir").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "ir")
    model = load(tmp_path / "ir").eval()
    for layer in model.model.layers:
        setattr(layer, wrapped, Saved(getattr(layer, wrapped)))
    ids = tokens(2, 12)
    before = model(ids).logits
    before.square().mean().backward()
    layer = model.model.layers[1]
    norm = layer.post_attention_layernorm.trained if wrapped != "mlp" else layer.post_feedforward_layernorm
    assert norm.weight.grad.abs().sum() > 0
    with torch.no_grad():
        norm.weight += 1.0
        assert (model(ids).logits - before).abs().max() > 0.01


class DynamicallyQuantized(nn.Module):
    """Stands in for torch's: what is called ``weight`` is a method."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


@torch.no_grad()
def test_router_whose_last_layer_has_no_weight_to_look_at():
    router, h = Router(32, 8), torch.randn(3, 40, 32)
    expected = router(h)
    router.score = DynamicallyQuantized(router.score)
    assert router(h).equal(expected)


def test_routers_last_layer_is_left_out_where_the_rest_is_quantized(exported):
    model = exported.model
    assert "score" in HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)

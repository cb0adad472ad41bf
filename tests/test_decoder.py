"""The streamed decoder is the base model, for every family, and routes as ONNX Runtime does."""

import json
import math

import pytest
import torch
from models import random_routing, save_random
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ir_convert import decoder as module
from ir_convert.calibrate import dense
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.evaluate import logits, measure
from ir_convert.export import hf
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4
from ir_convert.runtime import OnnxModel
from ir_convert.stream import Team, Work


def test_streamed_decoder_is_the_base_model(random_model, tmp_path):
    _, model, checkpoint, routing = random_model
    ids = torch.randint(3, 131, (3, 20), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(checkpoint, torch.device("cpu"))
    with torch.no_grad():
        base = model(ids).logits
    assert (logits(decoder, routing.units, ids, -math.inf) - base).abs().max() < 1e-4

    routed = logits(decoder, routing.units, ids, routing.threshold)
    assert (routed - base).abs().max() > 0.1  # routing does something
    write(checkpoint, routing, tmp_path, "m.onnx")
    in_ort = torch.from_numpy(OnnxModel.load(tmp_path / "m.onnx", threads=1).logits(ids.numpy()))
    assert (routed - in_ort).abs().max() < 1e-4


def everywhere(folder, tmp_path) -> list[torch.Tensor]:
    """Returns the dense logits of the base model by transformers, of the decoder, and of what is written."""
    checkpoint = Checkpoint.open(str(folder))
    routing = random_routing(checkpoint)
    ids = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in ("onnx", "hf"):
        (tmp_path / name).mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx")
    hf.write(checkpoint, routing, tmp_path / "hf", torch.float32)
    model = hf.load(tmp_path / "hf", dtype=torch.float32).eval()
    model.set_sparsity(0)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        exported = model(input_ids=ids).logits
    decoder = Decoder(checkpoint, torch.device("cpu"))
    in_ort = OnnxModel.load(tmp_path / "onnx" / "m.onnx", threads=1, threshold=-math.inf).logits(ids.numpy())
    return [base, logits(decoder, routing.units, ids, -math.inf), exported, torch.from_numpy(in_ort)]


def test_head_beside_the_embedding_that_it_is_said_to_be(tmp_path):
    """A head of its own is used, in all that is measured and written; one that is the embedding stays tied."""
    save_random("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    assert Checkpoint.open(str(tmp_path / "model")).tied
    save_file(tensors | {"lm_head.weight": torch.randn_like(embedding)}, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert not checkpoint.tied
    base, *others = everywhere(tmp_path / "model", tmp_path)
    for other in others:
        torch.testing.assert_close(other, base, atol=1e-4, rtol=0)
    (tmp_path / "int4").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "int4", "m.onnx", int4=Int4())


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2"])
def test_window_left_over_from_another_family(family, tmp_path):
    save_random(family, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 7}))
    base, *others = everywhere(tmp_path / "model", tmp_path)
    for other in others:
        torch.testing.assert_close(other, base, atol=1e-4, rtol=0)


def test_logits_of_few_tokens_at_a_time(tmp_path, monkeypatch):
    save_random("gemma2", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    routing = random_routing(checkpoint)
    ids = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(0))
    decoder, found = Decoder(checkpoint, torch.device("cpu")), []
    for most in (1 << 24, 131 * 7, 1):
        monkeypatch.setattr(module, "LOGITS", most)
        measured = measure(decoder, routing.units, ids, [routing.threshold])
        x = Work().states("x", (2, 20, checkpoint.config.hidden_size))
        x[:] = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        gradients = Work().states("g", (2, dense.PROBES, *x.shape[1:]))
        dense._probe_gradients(decoder, ids, x, gradients, 0, Team(), 2)
        found.append((measured.quality(1), gradients[slice(0, 2)]))
    (whole, first), *others = found
    assert not first[:, :, -1].any()
    for quality, gradients in others:
        assert quality.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
        assert quality.kl == pytest.approx(whole.kl, rel=1e-4)
        assert not gradients[:, :, -1].any()
        # Other noise, of the same size.
        assert float(gradients.norm()) == pytest.approx(float(first.norm()), rel=0.3)


def test_figures_are_those_of_the_logits(random_model):
    _, _, checkpoint, routing = random_model
    decoder = Decoder(checkpoint, torch.device("cpu"))
    ids = torch.randint(3, 131, (3, 20), generator=torch.Generator().manual_seed(0))
    quality = measure(decoder, routing.units, ids, [routing.threshold]).quality(1)
    base, ours = (
        logits(decoder, routing.units, ids, at)[:, :-1].log_softmax(-1) for at in (-math.inf, routing.threshold)
    )
    assert quality.kl == pytest.approx(float((base.exp() * (base - ours)).sum(-1).mean()), rel=1e-4)
    assert quality.agreement == pytest.approx(float((base.argmax(-1) == ours.argmax(-1)).float().mean()))
    nll = F.nll_loss(ours.flatten(0, 1), ids[:, 1:].flatten())
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


def test_one_layer_is_in_memory_at_a_time(random_model):
    _, _, checkpoint, _ = random_model
    decoder = Decoder(checkpoint, torch.device("cpu"))

    def loaded() -> list[int]:
        layers = decoder._skeleton.model.layers
        return [index for index, layer in enumerate(layers) if not all(weight.is_meta for weight in layer.parameters())]

    for index, _ in decoder.layers():
        assert loaded() == [index]
    decoder.head()
    assert loaded() == []

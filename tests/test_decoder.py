"""The streamed decoder is the base model, for every family, and routes as ONNX Runtime does."""

import math

import torch

from ir_convert.decoder import Decoder
from ir_convert.evaluate import logits
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


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

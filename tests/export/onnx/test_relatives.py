"""Models of families that are put together from what other families are tested for, in ONNX Runtime and as calibration runs them."""

import math

import pytest
import torch
from models import RELATIVES, make_random
from onnx_reference import Batch, Reference, run_pieces

from ir_convert.decoder import Decoder
from ir_convert.evaluate import logits
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


@pytest.fixture(scope="module", params=RELATIVES)
def made(request, tmp_path_factory):
    """(the runtime's model, the torch reference, the checkpoint)"""
    _, model, checkpoint, routing = make_random(request.param, tmp_path_factory.mktemp(request.param))
    folder = tmp_path_factory.mktemp(f"{request.param}-onnx")
    write(checkpoint, routing, folder, "m.onnx")
    return OnnxModel.load(folder, threads=1), Reference(model, routing, {}), checkpoint


@pytest.fixture
def batch() -> Batch:
    """Rows of 20 and 14 tokens, padded on the left, fed as a prompt and a token or several at a time."""
    ids = torch.randint(3, 131, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return Batch(ids, mask, [11, 1, 1, 4, 3])


@torch.no_grad()
def test_dense_is_the_base_model(made, batch):
    model, reference, checkpoint = made
    model.threshold = -math.inf
    positions, real = (batch.mask.cumsum(1) - 1).clamp(min=0), batch.mask.bool()
    expected = reference.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions).logits
    torch.testing.assert_close(run_pieces(model, batch)[real], expected[real], atol=1e-4, rtol=0)
    streamed = logits(Decoder(checkpoint, torch.device("cpu")), reference.routing.units, batch.ids[:1], -math.inf)
    torch.testing.assert_close(streamed[0], expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("threshold", [-1.5, 0.0, 1.5, math.inf])
def test_routed_is_the_method(made, batch, threshold):
    model, reference, checkpoint = made
    expected, real = reference(batch.ids, batch.mask, threshold), batch.mask.bool()
    assert reference.margin > 1e-5
    model.threshold = threshold
    torch.testing.assert_close(run_pieces(model, batch)[real], expected[real], atol=1e-4, rtol=0)
    streamed = logits(Decoder(checkpoint, torch.device("cpu")), reference.routing.units, batch.ids[:1], threshold)
    torch.testing.assert_close(streamed[0], expected[0], atol=1e-4, rtol=0)

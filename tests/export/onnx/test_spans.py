"""Long prompts, whose attention goes in spans of queries: the same numbers, and no score of slots that nothing in a span sees."""

import math
from unittest.mock import patch

import pytest
import torch
from models import random_routing, save_random
from onnx_reference import Batch, Reference, profile, run_pieces

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import attend, write
from ir_convert.runtime import OnnxModel

SPAN, LENGTH = 32, 200


def exported(folder, family: str, kv_cache: str = "full", units: tuple[str, ...] = ("attention", "mlp")):
    """Returns the runtime's model with spans of ``SPAN`` queries, and its reference."""
    model = save_random(family, folder)
    checkpoint = Checkpoint.open(str(folder))
    routing = random_routing(checkpoint, kv_cache=kv_cache, units=units)
    (folder / "onnx").mkdir()
    with patch.object(attend, "SPAN", SPAN):
        write(checkpoint, routing, folder / "onnx", "m.onnx")
    return OnnxModel.load(folder / "onnx", threads=1, library=False), Reference(model, routing, {})


def prompts(*paddings: int, pieces: list[int] | None = None) -> Batch:
    """Texts of ``LENGTH`` tokens, the first of each padding."""
    ids = torch.randint(3, 131, (len(paddings), LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    return Batch(ids, mask, pieces or [LENGTH])


@pytest.mark.parametrize("units", [("attention", "mlp"), ("mlp",)], ids=["routed", "dense"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
def test_logits(family, units, tmp_path):
    model, reference = exported(tmp_path, family, units=units)
    for batch in (prompts(0), prompts(0, 90, 199), prompts(0, 50, pieces=[70, 1, 129])):
        for threshold in (-math.inf, 0.0, 1.5):
            expected = reference(batch.ids, batch.mask, threshold)
            assert reference.margin > 1e-5
            model.threshold = threshold
            real = batch.mask.bool()
            torch.testing.assert_close(run_pieces(model, batch)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "slots"), [("llama", [32, 64, 96, 128, 160, 192, 200]), ("phi3", [32, *[40] * 5, 16])]
)
def test_scores_that_are_computed(family, slots, tmp_path):
    """Of a sliding window of 9, spans see 8 slots before their own first."""
    model, _ = exported(tmp_path, family)
    (ran,) = profile(model, prompts(0), [-math.inf], tmp_path)
    shapes = [
        [next(iter(shape.values())) for shape in event["args"]["input_type_shape"]]
        for event in ran
        if event["args"]["op_name"] == "Attention"
    ]
    assert [queries[2] for queries, *_ in shapes] == [*[SPAN] * 6, 8] * 3
    assert [keys[2] for _, keys, *_ in shapes] == slots * 3
    assert [mask[3] for *_, mask in shapes] == slots * 3


def test_strict(tmp_path):
    """What a strict cache left out is seen by nothing: the same logits as with one span for all."""
    model, _ = exported(tmp_path, "llama", "strict")
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "whole").mkdir()
    write(checkpoint, random_routing(checkpoint, kv_cache="strict"), tmp_path / "whole", "m.onnx")
    whole = OnnxModel.load(tmp_path / "whole", threads=1, library=False)
    batch = prompts(0, 90, pieces=[128, 72])
    real = batch.mask.bool()
    for threshold in (-math.inf, 0.0):
        model.threshold = whole.threshold = threshold
        torch.testing.assert_close(run_pieces(model, batch)[real], run_pieces(whole, batch)[real], atol=1e-4, rtol=0)

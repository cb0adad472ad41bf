"""Rotary embeddings by layer, and of texts of any length."""

import math

import numpy as np
import pytest
import torch
from models import CONFIGS, random_routing, save_random
from onnx_reference import Batch, run_pieces
from stream_reference import StreamReference

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.onnx import write
from ir_convert.export.onnx.rotary import frequencies
from ir_convert.runtime import OnnxModel


def test_local_and_global_layers_differ():
    local, everywhere = (frequencies(CONFIGS["gemma3"], layer).inverse for layer in (0, 1))
    steps = torch.arange(0, 16, 2) / 16
    torch.testing.assert_close(local, 70.0**-steps)
    torch.testing.assert_close(everywhere, 5000.0**-steps)
    assert frequencies(CONFIGS["gemma3"], 2).inverse.equal(local)


def test_part_of_a_head():
    assert len(frequencies(CONFIGS["phi3"]).inverse) == 2  # of heads of width 8, half is rotated, in pairs


def test_long_texts_have_frequencies_of_their_own():
    found = frequencies(CONFIGS["phi3-long"])
    assert found.long is not None
    assert found.bound == 128
    ratio = found.inverse / found.long
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2 / 1.5, 2.0, 3.0]))
    assert found.scale > 1


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    path = tmp_path_factory.mktemp("long")
    save_random("phi3-long", path / "base")
    checkpoint = Checkpoint.open(str(path / "base"))
    routing = random_routing(checkpoint)
    (path / "onnx").mkdir()
    write(checkpoint, routing, path / "onnx", "m.onnx")
    return OnnxModel.load(path / "onnx", threads=1), StreamReference(checkpoint, routing)


@pytest.mark.parametrize("threshold", [-math.inf, 0.5])
def test_each_text_by_its_own_length(long, threshold):
    """128 tokens are a short text, 129 a long one; in a batch as alone."""
    model, reference = long
    ids = torch.randint(3, 131, (3, 140), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :12], mask[1, :11] = 0, 0
    expected = reference(ids, mask, threshold)
    assert expected.margin > 1e-4
    model.threshold = threshold
    got = run_pieces(model, Batch(ids, mask, [140]))
    real = mask.bool()
    torch.testing.assert_close(got[real], expected.logits[real], atol=1e-4, rtol=0)


def generated(model: OnnxModel, ids: np.ndarray, mask: np.ndarray | None = None, **kwargs) -> np.ndarray:
    return np.stack(list(model.generate(ids, mask, 40, **({"eos_ids": ()} | kwargs))), axis=1)


def test_generates_across_the_bound_as_transformers(long, tmp_path):
    model, _ = long
    model.threshold = -math.inf
    base = save_random("phi3-long", tmp_path)  # the one that was exported
    ids = np.random.default_rng(1).integers(3, 131, (1, 110))
    expected = base.generate(
        torch.from_numpy(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    np.testing.assert_array_equal(generated(model, ids), expected[:, 110:].numpy())


@pytest.mark.parametrize("threshold", [-math.inf, 0.0])
def test_generates_across_the_bound_as_without_a_cache(long, threshold):
    model, _ = long
    model.threshold = threshold
    ids = np.random.default_rng(1).integers(3, 131, (1, 110))
    got = generated(model, ids)
    for _ in range(40):
        ids = np.concatenate([ids, model.logits(ids)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(got, ids[:, 110:])
    np.testing.assert_array_equal(generated(model, ids[:, :110], chunk_size=50), ids[:, 110:])


def test_each_text_of_a_batch_passes_the_bound_by_itself(long):
    """One starts beyond it, two pass it at different steps, one never does; one has ended when another passes it."""
    model, _ = long
    model.threshold = -math.inf
    lengths = np.array([[135], [120], [97], [60]])
    ids = np.random.default_rng(4).integers(3, 131, (4, 135))
    mask = (np.arange(135) >= 135 - lengths).astype(np.int64)
    alone = np.concatenate(
        [generated(model, row[None, 135 - length :]) for row, (length,) in zip(ids, lengths, strict=True)]
    )
    np.testing.assert_array_equal(generated(model, ids, mask), alone)
    np.testing.assert_array_equal(generated(model, ids, mask, chunk_size=50), alone)  # not parted: one is beyond it
    one = alone[1].tolist()
    stop = next(place for place in range(12, 40) if one[place] not in [*one[:place], *alone[2]])
    end = one[stop]
    got = generated(model, ids, mask, eos_ids=end)
    np.testing.assert_array_equal(got[2], alone[2])
    assert got[1].tolist() == one[:stop] + [end] * (40 - stop)


def test_the_bound_matters(long):
    """The test above can fail: one token more at the end changes what comes before it."""
    model, _ = long
    model.threshold = -math.inf
    ids = torch.randint(3, 131, (1, 129), generator=torch.Generator().manual_seed(2))
    logits = [torch.from_numpy(model.logits(ids[:, :length].numpy()))[0, 100] for length in (127, 128, 129)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[1] - logits[2]).abs().max() > 1e-2

"""``--logits last``: the head sees each text's last token alone, and whoever generates gets what they got before."""

import json

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.cli import convert as command
from ir_convert.convert import Conversion, convert
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4
from ir_convert.runtime import OnnxModel

KINDS = {
    "plain": ("llama", None),
    "tied": ("qwen3", None),
    "capped": ("gemma2", None),
    "int4": ("llama", Int4()),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[OnnxModel, OnnxModel]:
    """One model with all logits, and with the last."""
    family, int4 = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_random(family, folder / "base")
    checkpoint = Checkpoint.open(str(folder / "base"))
    routing = random_routing(checkpoint)
    models = []
    for logits in ("all", "last"):
        (folder / logits).mkdir()
        write(checkpoint, routing, folder / logits, "m.onnx", int4=int4, logits=logits)
        models.append(OnnxModel.load(folder / logits, threads=1, library=False))
    return models[0], models[1]


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 7), past=st.integers(0, 4), seed=st.integers(0, 2**16))
def test_logits_are_those_of_the_last_real_token(pair, batch, length, past, seed):
    """Padding may be anywhere; over a cache as well as without."""
    every, last = pair
    generator = np.random.default_rng(seed)
    mask = (generator.random((batch, past + length)) < 0.6).astype(np.int64)
    mask[np.arange(batch), past + generator.integers(0, length, batch)] = 1
    ids = generator.integers(3, 131, mask.shape)
    caches = [None, None]
    if past:
        caches = [model.forward(ids[:, :past], mask[:, :past])[1] for model in pair]
    (expected, presents), (got, others) = (
        model.forward(ids[:, past:], mask, past=cache) for model, cache in zip(pair, caches, strict=True)
    )
    assert got.shape == (batch, 1, expected.shape[2])
    place = [max(index for index in range(length) if row[past + index]) for row in mask]
    np.testing.assert_allclose(got[:, 0], expected[np.arange(batch), place], atol=2e-5)
    for present, other in zip(presents, others, strict=True):
        np.testing.assert_array_equal(present, other)
    assert every.saved == last.saved


def test_generates_the_same(pair):
    """Left-padded, token by token, with and without a cache of its own."""
    ids = np.random.default_rng(0).integers(3, 131, (3, 9))
    mask = np.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    texts = [np.stack(list(model.generate(ids, mask, 24, eos_ids=())), 1) for model in pair]
    np.testing.assert_array_equal(*texts)


def test_the_head_runs_for_one_token(tmp_path):
    """The product with the head's weight is a row a text, however long the texts."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    (tmp_path / "m").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "m", "m.onnx", logits="last")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    model = OnnxModel.load(tmp_path / "m", threads=1, options=options)
    model.logits(np.random.default_rng(0).integers(3, 131, (2, 30)))
    with open(model.session.end_profiling()) as file:
        events = json.load(file)
    shapes = [
        next(iter(shape.values()))
        for event in events
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] in ("MatMul", "Gemm", "FusedMatMul")
        for shape in event["args"]["output_type_shape"]
        if next(iter(shape.values()))[-1] == checkpoint.config.vocab_size
    ]
    assert shapes == [[2, 1, checkpoint.config.vocab_size]]


def test_the_option(tmp_path, monkeypatch):
    save_random("llama", tmp_path / "base")
    random_routing(Checkpoint.open(str(tmp_path / "base"))).save(tmp_path / "r.safetensors")

    def run(out: str, **options: object) -> None:
        convert(str(tmp_path / "base"), [tmp_path / out], routing=tmp_path / "r.safetensors", **options)

    run("m.onnx", logits="last")
    (logits,) = [value for value in OnnxModel.load(tmp_path / "m.onnx").session.get_outputs() if value.name == "logits"]
    assert logits.shape[1] == 1
    with pytest.raises(UserError, match="--logits 'some' is not known: give all or last"):
        run("n.onnx", logits="some")
    assert not (tmp_path / "n.onnx").exists()

    asked = {}
    monkeypatch.setattr(
        "ir_convert.convert.convert", lambda *_, **options: asked.update(options) or Conversion(None, {}, 0)
    )
    CliRunner().invoke(command, ["m", "--out", "o.onnx", "--logits", "last"], catch_exceptions=False)
    assert asked["logits"] == "last"

"""optimum's ORTModelForCausalLM runs what was written, and its ``generate`` says what the routed checkpoint says."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import random_routing
from optimum.onnxruntime import ORTModelForCausalLM
from stream_reference import StreamReference
from trained import TINY
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ir_convert.checkpoint import Checkpoint
from ir_convert.export import hf, onnx

NEW = 32
LENGTH = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
PROMPTS = ['The "with" statement', "def __init__(self, name):\n    self.name = name\n", "x"]


@dataclass
class Written:
    """One model, both ways."""

    ort: ORTModelForCausalLM
    hf: PreTrainedModel
    stream: StreamReference
    tokenizer: PreTrainedTokenizerBase
    threshold: float


@pytest.fixture(scope="module", params=["full", "strict"])
def written(request, tmp_path_factory) -> Written:
    """The tiny trained model with a random routing: what is routed matters here, not how well."""
    checkpoint = Checkpoint.open(str(TINY))
    routing = random_routing(checkpoint, kv_cache=request.param)
    folders: list[Path] = [tmp_path_factory.mktemp(name) for name in ("onnx", "hf")]
    onnx.write(checkpoint, routing, folders[0], "ir-tiny.onnx")
    hf.write(checkpoint, routing, folders[1], torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folders[0], padding_side="left")
    return Written(
        ORTModelForCausalLM.from_pretrained(folders[0]),
        hf.load(folders[1]).eval(),
        StreamReference(checkpoint, routing),
        tokenizer,
        routing.threshold,
    )


def test_same_tokens_as_the_checkpoint(written):
    """Left-padded and batched; and routing did decide."""
    inputs = written.tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert inputs.attention_mask.sum(1).unique().numel() == len(PROMPTS)
    ours = written.ort.generate(**inputs, **LENGTH)
    with written.hf.routing_statistics() as seen:
        assert ours.equal(written.hf.generate(**inputs, **LENGTH))
    assert 0.1 < seen.decisions < 0.9
    assert ours.shape[1] == inputs.input_ids.shape[1] + NEW


def test_batched_is_as_each_alone(written):
    inputs = written.tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    width = inputs.input_ids.shape[1]
    batched = written.ort.generate(**inputs, **LENGTH)[:, width:]
    for row, prompt in zip(batched, PROMPTS, strict=True):
        alone = written.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert row.equal(written.ort.generate(**alone, **LENGTH)[0, alone.input_ids.shape[1] :])


def test_logits_of_the_last_token_alone(tmp_path):
    checkpoint = Checkpoint.open(str(TINY))
    routing, tokenizer = random_routing(checkpoint), AutoTokenizer.from_pretrained(TINY, padding_side="left")
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    texts = []
    for logits in ("all", "last"):
        (tmp_path / logits).mkdir()
        onnx.write(checkpoint, routing, tmp_path / logits, "m.onnx", logits=logits)
        texts.append(ORTModelForCausalLM.from_pretrained(tmp_path / logits).generate(**inputs, **LENGTH))
    assert texts[0].equal(texts[1])


def test_same_logits_as_calibration(written):
    """One call without a cache, against the method as calibration runs it."""
    ids = written.tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    streamed = written.stream(ids, mask, written.threshold)
    assert streamed.margin > 1e-5
    torch.testing.assert_close(written.ort(ids, attention_mask=mask).logits, streamed.logits, atol=1e-4, rtol=0)

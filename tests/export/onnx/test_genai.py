"""onnxruntime-genai runs what was written: the same tokens, alone and in batches of different lengths, and the same text."""

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from models import CONFIGS, EVERY, SIZES, random_routing, save_random
from transformers import Phi3Config

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import genai, write
from ir_convert.export.onnx.metadata import metadata
from ir_convert.runtime import OnnxModel

NEW = 40
TEXTS = [
    'def __init__(self, name="x"):\n    return {name: 1}  # ünïcödé, 日本語 and 🙂\n',
    'The "with" statement is used to wrap the execution of a block.',
    "  two spaces, a\ttab\n\n\nand   three lines",
    "x",
]


def load(folder: Path, share: bool) -> og.Model:
    """Loads a model whose keys and values live in one buffer for all calls, or in one for each."""
    config = og.Config(str(folder))
    config.overlay(json.dumps({"search": {"past_present_share_buffer": share}}))
    return og.Model(config)


def generator(model: og.Model, prompts: list[list[int]], pad: int, new: int = NEW, **search: int) -> og.Generator:
    """Prompts of different length are padded on the right, as genai's tokenizer does."""
    width = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), max_length=width + new, **search)
    started = og.Generator(model, params)
    started.append_tokens(np.array([prompt + [pad] * (width - len(prompt)) for prompt in prompts], np.int32))
    return started


def generate(
    model: og.Model, prompts: list[list[int]], ends: frozenset[int], pad: int, **search: int
) -> list[list[int]]:
    """Returns what follows each prompt."""
    started, width = generator(model, prompts, pad, **search), max(map(len, prompts))
    while not started.is_done():
        started.generate_next_token()
    return [until_end(started.get_sequence(row).tolist()[width:], ends) for row in range(len(prompts))]


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def greedy(model: OnnxModel, prompt: list[int]) -> list[int]:
    """Returns what our own runtime makes of a prompt."""
    steps = model.generate(np.array([prompt]), max_new_tokens=NEW)
    return until_end([int(step[0]) for step in steps], model.eos_ids)


@pytest.fixture(scope="module", params=[False, True])
def family(exported, request):
    """A random model in genai, with and without one buffer, the tokens that end a text, prompts, and what follows them."""
    ours = OnnxModel.load(exported[0].path, threads=1)  # at its own threshold: other tests move the other's
    return load(ours.path.parent, request.param), ours.eos_ids, *random_prompts(ours)


def test_every_family(family):
    """With all sizes of heads."""
    model, ends, prompts, expected = family
    assert [generate(model, [prompt], ends, 0)[0] for prompt in prompts] == expected


def test_prompts_in_chunks(family):
    model, ends, prompts, expected = family
    assert [generate(model, [prompt], ends, 0, chunk_size=4)[0] for prompt in prompts] == expected


def test_every_family_in_a_batch(family):
    model, ends, prompts, expected = family
    assert generate(model, prompts, ends, 0) == expected


@pytest.mark.parametrize("share", [False, True])
def test_logits_of_the_last_token_alone(share, tmp_path):
    """A batch is padded on the right, so the last token is not the last real one."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    (tmp_path / "m").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "m", "größe 1.onnx", logits="last")
    ours = OnnxModel.load(tmp_path / "m", threads=1)
    prompts, expected = random_prompts(ours)
    model = load(tmp_path / "m", share)
    assert [generate(model, [prompt], ours.eos_ids, 0)[0] for prompt in prompts] == expected
    assert generate(model, prompts, ours.eos_ids, 0) == expected


@pytest.mark.parametrize("share", [False, True])
def test_a_text_that_grows_past_the_bound_of_its_frequencies(share, tmp_path, monkeypatch):
    """genai runs it anew at its 4097th token, as our own runtime does; short texts, in batches too, are as of all families."""
    rope = CONFIGS["phi3-long"].to_dict()
    scaling = {"type": "longrope"} | {
        name: (rope.get("rope_parameters") or rope["rope_scaling"])[name] for name in ("short_factor", "long_factor")
    }
    sizes = SIZES | {"max_position_embeddings": 8192}
    config = Phi3Config(**sizes, original_max_position_embeddings=4096, rope_scaling=scaling)
    monkeypatch.setitem(EVERY, "phi3-4096", config)
    save_random("phi3-4096", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    (tmp_path / "m").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "m", "m.onnx")
    ours, model = OnnxModel.load(tmp_path / "m", threads=1), load(tmp_path / "m", share)
    prompt = np.random.default_rng(1).integers(3, 131, 4080).tolist()
    expected = greedy(ours, prompt)
    text = prompt + expected
    assert len(text) > 4100
    assert text[4097:] == ours.logits(np.array([text[:-1]]))[0, 4096:].argmax(-1).tolist()  # as without a cache
    assert generate(model, [prompt], ours.eos_ids, 0) == [expected]
    prompts, expected = random_prompts(ours)
    assert generate(model, prompts, ours.eos_ids, 0) == expected


def random_prompts(model: OnnxModel) -> tuple[list[list[int]], list[list[int]]]:
    """Returns prompts of different lengths, and what our own runtime makes of each by itself."""
    prompts = [np.random.default_rng(seed).integers(3, 131, length).tolist() for seed, length in enumerate([9, 2, 5])]
    expected = [greedy(model, prompt) for prompt in prompts]
    assert max(map(len, expected)) > 10
    return prompts, expected


@pytest.mark.parametrize("share", [False, True])
def test_same_text_as_the_checkpoint(converted, share):
    ours = OnnxModel.load(converted.onnx)
    model = load(converted.onnx.parent, share)
    prompts = [converted.unseen[row, :length].tolist() for row, length in ((0, 40), (3, 23), (5, 9))]
    expected = []
    for prompt in prompts:
        with_prompt = converted.routed.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        expected.append(until_end(with_prompt[0, len(prompt) :].tolist(), ours.eos_ids))
        assert expected[-1] == greedy(ours, prompt)
    assert max(map(len, expected)) == NEW
    (pad,) = ours.eos_ids
    assert [generate(model, [prompt], ours.eos_ids, pad)[0] for prompt in prompts] == expected
    assert generate(model, prompts, ours.eos_ids, pad) == expected


def test_reports_what_was_saved(converted):
    """``routing_saved`` is an output like any other; padding does not count in it."""
    ours = OnnxModel.load(converted.onnx)
    prompts = [converted.unseen[0, :17].tolist(), converted.unseen[1, :6].tolist()]
    started = generator(og.Model(str(converted.onnx.parent)), prompts, pad=1)
    ids, mask = np.ones((2, 17), np.int64), np.arange(17) < np.array([[17], [6]])
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    ours.logits(ids, mask)
    assert 0 < ours.saved < 1
    assert started.get_output("routing_saved") == pytest.approx(ours.saved)


def test_tokenizer(converted):
    """The tokenizer's files serve genai's own tokenizer: same tokens, and text back, whole or as a stream."""
    tokenizer = og.Tokenizer(og.Model(str(converted.onnx.parent)))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == converted.tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        stream = tokenizer.create_stream()
        pieces = [stream.decode(token) for token in ids]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
    batch = tokenizer.encode_batch(TEXTS).as_numpy()
    for row, text in zip(batch, TEXTS, strict=True):
        ids = converted.tokenizer(text)["input_ids"]
        assert row.tolist() == ids + [tokenizer.pad_token_id] * (batch.shape[1] - len(ids))
    assert tokenizer.eos_token_ids.tolist() == [converted.tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == converted.tokenizer.pad_token_id


def test_a_prompt_in_two_pieces(converted):
    """More than one token over a cache that is not empty."""
    ours = OnnxModel.load(converted.onnx)
    first, second = converted.unseen[0, :12].tolist(), converted.unseen[1, :7].tolist()
    started = generator(og.Model(str(converted.onnx.parent)), [first], pad=1)
    started.append_tokens(np.array([second], np.int32))
    for _ in range(5):
        started.generate_next_token()
    assert started.get_sequence(0).tolist() == first + second + greedy(ours, first + second)[:5]


@pytest.fixture
def base(tmp_path):
    """A checkpoint's folder; tests change its configuration."""
    save_random("llama-bias", tmp_path)
    return tmp_path


def change(folder: Path, name: str, **values: object) -> Checkpoint:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return Checkpoint.open(str(folder))


def test_special_tokens(base):
    def tokens(**generation: object) -> dict[str, object]:
        said = genai.settings(change(base, "generation_config.json", **generation), "m.onnx")["model"]
        return {key.removesuffix("_token_id"): value for key, value in said.items() if key.endswith("_token_id")}

    assert tokens() == {"bos": 1, "eos": 2, "pad": 0}
    assert tokens(eos_token_id=[7, 9]) == {"bos": 1, "eos": [7, 9], "pad": 0}
    change(base, "config.json", pad_token_id=None)
    assert tokens(pad_token_id=None) == {"bos": 1, "eos": [7, 9], "pad": 7}  # texts end with it, as in transformers
    assert tokens(pad_token_id=-1)["pad"] == 7
    assert tokens(eos_token_id=2, pad_token_id=5) == {"bos": 1, "eos": 2, "pad": 5}
    change(base, "config.json", pad_token_id=None, eos_token_id=None, bos_token_id=None)
    (base / "generation_config.json").unlink()
    assert not [key for key in genai.settings(Checkpoint.open(str(base)), "m.onnx")["model"] if "token" in key]


def test_sampling_is_the_base_models(base):
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    checkpoint = change(base, "generation_config.json", **said, top_p=None)
    assert genai.settings(checkpoint, "m.onnx")["search"] == said | {"past_present_share_buffer": True}
    checkpoint = change(base, "generation_config.json", top_p=0.9)
    assert genai.settings(checkpoint, "m.onnx")["search"]["top_p"] == 0.9


def test_sizes(tmp_path):
    """genai takes some from the file itself, today."""
    save_random("gemma3", tmp_path)
    model = genai.settings(Checkpoint.open(str(tmp_path)), "m.onnx")["model"]
    assert (model["vocab_size"], model["context_length"]) == (131, 256)
    names = ("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [model["decoder"][name] for name in names] == [48, 16, 6, 2, 3]


@pytest.mark.parametrize(("family", "bound"), [("phi3-long", 128), ("phi3", None)])
def test_other_bounds_than_the_one_that_genai_knows(family, bound, tmp_path):
    save_random(family, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert genai.settings(checkpoint, "m.onnx")["model"]["type"] == "decoder"
    assert metadata(checkpoint, random_routing(checkpoint))["long_text_bound"] == bound


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_generation_config(content, base):
    (base / "generation_config.json").write_text(content)
    checkpoint = Checkpoint.open(str(base))
    with pytest.raises(UserError, match=r"generation_config.json is damaged"):
        genai.settings(checkpoint, "m.onnx")

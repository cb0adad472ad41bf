"""The ONNX runtime: generation with the cache, in batches, sampling, and calls that it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel
from ir_convert.runtime.buffers import Buffers

NO_END: tuple[int, ...] = ()


def generate(
    model: OnnxModel, ids: np.ndarray, mask: np.ndarray | None = None, tokens: int = 64, **kwargs
) -> np.ndarray:
    return np.stack(list(model.generate(ids, mask, tokens, **({"eos_ids": NO_END} | kwargs))), axis=1)


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """How many tokens of each text every run of a model with buffers takes."""
    taken, run = [], Buffers._run

    def counted(self: Buffers, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        taken.append(feed["input_ids"].shape[1])
        return run(self, feed)

    monkeypatch.setattr(Buffers, "_run", counted)
    return taken


@pytest.fixture
def traced(tmp_path) -> OnnxModel:
    """A model that says what it executed."""
    save_random("mistral-sliding", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "onnx").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "onnx", "m.onnx", trace=True)
    return OnnxModel.load(tmp_path / "onnx", threads=1)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.4])
def test_cache_changes_nothing(model, prompt, sparsity):
    model.set_sparsity(sparsity)
    tokens = prompt
    for _ in range(64):
        tokens = np.concatenate([tokens, model.logits(tokens)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generate(model, prompt), tokens[:, 9:])


def test_generates_in_float16(tmp_path):
    save_random("llama", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "onnx").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "onnx", "m.onnx", dtype=torch.float16)
    model, ids = OnnxModel.load(tmp_path / "onnx", threads=1), np.random.default_rng(3).integers(3, 131, (2, 9))
    for token in model.generate(ids, max_new_tokens=12, eos_ids=NO_END):
        logits = model.logits(ids)[:, -1].astype(np.float32)
        chosen = np.take_along_axis(logits, token[:, None], 1)
        assert (logits.max(1, keepdims=True) - chosen < 0.05).all()
        ids = np.concatenate([ids, token[:, None]], 1)


def test_dense_generates_as_transformers(base, model, prompt):
    model.set_sparsity(0)
    expected = base[0].generate(
        torch.from_numpy(prompt), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0
    )
    expected = expected[0, 9:].numpy()
    # generate() with min_new_tokens forbids the end token, so compare up to where ours takes it.
    got = generate(model, prompt, tokens=40)[0]
    stop = np.flatnonzero(got == 2)[0] if (got == 2).any() else 40
    assert stop > 3
    np.testing.assert_array_equal(got[:stop], expected[:stop])


def test_left_padded_batch_generates_as_each_alone(model):
    prompts = [np.random.default_rng(seed).integers(3, 131, (1, length)) for seed, length in enumerate([3, 11, 7])]
    ids = np.concatenate([np.pad(prompt, ((0, 0), (11 - prompt.shape[1], 0))) for prompt in prompts])
    mask = (np.arange(11) >= 11 - np.array([[3], [11], [7]])).astype(np.int64)
    got = generate(model, ids, mask, tokens=24)
    for row, prompt in zip(got, prompts, strict=True):
        np.testing.assert_array_equal(row, generate(model, prompt, tokens=24)[0])


def test_a_text_that_has_ended_leaves_the_others_alone(model):
    ids = np.random.default_rng(8).integers(3, 131, (2, 6))
    free = generate(model, ids, tokens=20)
    end = next(token for token in free[0] if token not in free[1])
    got = generate(model, ids, tokens=20, eos_ids=[int(end)])
    np.testing.assert_array_equal(got[1], free[1])
    stop = list(free[0]).index(end)
    np.testing.assert_array_equal(got[0, : stop + 1], free[0, : stop + 1])
    assert set(got[0, stop:]) == {end}
    assert generate(model, ids[:1], tokens=20, eos_ids=[int(end)]).shape[1] == stop + 1


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11])
def test_prompts_in_chunks(chunk_size, traced, lengths):
    """The same tokens, share saved and decisions; one prompt's first chunks are padding."""
    ids = np.random.default_rng(4).integers(3, 131, (3, 11))
    mask = (np.arange(11) >= [[0], [9], [3]]).astype(np.int64)
    traced.set_sparsity(0.3)
    expected = generate(traced, ids, mask, tokens=12)
    next(traced.generate(ids, mask))
    saved, executed = traced.saved, traced.executed
    lengths.clear()
    next(traced.generate(ids, mask, chunk_size=chunk_size))
    assert len(lengths) == math.ceil(11 / chunk_size)
    assert set(lengths[:-1]) <= {chunk_size}
    assert sum(lengths) == 11
    assert traced.saved == pytest.approx(saved, abs=1e-6)
    np.testing.assert_array_equal(traced.executed, executed)
    np.testing.assert_array_equal(generate(traced, ids, mask, tokens=12, chunk_size=chunk_size), expected)


def test_long_prompts_go_in_chunks_by_themselves(model, lengths):
    next(model.generate(np.full((1, 2049), 5)))
    assert lengths == [1024, 1024, 1]


def test_sampling(model, prompt):
    def sample(**kwargs) -> list[int]:
        return generate(model, prompt, tokens=12, temperature=1.5, **kwargs)[0].tolist()

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    greedy = generate(model, prompt, tokens=12)[0].tolist()
    assert sample(seed=1, top_k=1) == sample(seed=1, top_p=1e-9) == sample(seed=1, top_p=0) == greedy
    assert generate(model, prompt, tokens=12, temperature=1e-38, seed=1)[0].tolist() == greedy
    likeliest = set(np.argsort(-model.logits(prompt)[0, -1])[:3].tolist())
    drawn = {generate(model, prompt, tokens=1, temperature=3.0, top_k=3, seed=seed)[0, 0].item() for seed in range(30)}
    assert drawn == likeliest


def test_what_is_yielded_is_the_callers(model, prompt):
    expected = generate(model, prompt, tokens=8)
    found = []
    for token in model.generate(prompt, max_new_tokens=8, eos_ids=NO_END):
        found.append(token.copy())
        token += 1
    assert (np.stack(found, axis=1) == expected).all()


def test_one_end_token(model, prompt):
    end = int(generate(model, prompt, tokens=5)[0, 3])
    np.testing.assert_array_equal(generate(model, prompt, eos_ids=end), generate(model, prompt, eos_ids=[end]))


def test_end_tokens_that_are_given_take_the_place_of_the_models(model, prompt):
    model.eos_ids = frozenset(range(1, 131))
    assert len(list(model.generate(prompt, max_new_tokens=5))) == 1
    for ends in ((), [], 0):
        assert len(list(model.generate(prompt, max_new_tokens=5, eos_ids=ends))) == 5


def test_generation_copies_no_cache(base, prompt, tmp_path):
    """Only what writes keys and values gives out tensors of the cache's size, and it was handed past and present as one."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    model = OnnxModel.load(base[1], threads=1, sparsity=0.2, options=options)
    generate(model, prompt, tokens=20)
    events = json.loads(Path(model.session.end_profiling()).read_text())
    writers = {
        event["args"]["op_name"]
        for event in events
        for output in event["args"].get("output_type_shape", [])
        for shape in output.values()
        if event["name"].endswith("_kernel_time") and len(shape) == 4 and shape[2] == prompt.shape[1] + 20 - 1
    }
    assert writers - {"If"} == {"TensorScatter", "GroupQueryAttention"}


def test_bad_calls_say_what_to_do(model, prompt):
    with pytest.raises(UserError, match="padded on the left"):
        next(model.generate(prompt.repeat(2, 0), np.array([[1] * 9, [1] * 8 + [0]])))
    for nothing in (np.zeros((1, 0)), np.zeros((0, 3))):
        with pytest.raises(UserError, match="prompts of at least one token"):
            next(model.generate(nothing))
    for ids, message in (
        ([[1, 2], [3]], "input_ids are texts of different lengths: pad them"),
        ([1, 2], r"int64 \[2\]: give token ids"),
        ([[0.5, 1.0]], r"float64 \[1, 2\]: give token ids"),
        ([[1, -1]], "with negative ones"),
        ("text", "give token ids"),
    ):
        for run in (model.logits, lambda ids: next(model.generate(ids))):
            with pytest.raises(UserError, match=message):
                run(ids)
    for run in (model.logits, lambda *arguments: next(model.generate(*arguments))):
        for shape in ((1, 3), (1, 14), (2, 9), (9,)):
            with pytest.raises(UserError, match=rf"attention_mask \{list(shape)} is not \[1, 9\]: give 0 or 1"):
                run(prompt, np.ones(shape))
        for value in (2, 0.5, -1):
            with pytest.raises(UserError, match="attention_mask holds values other than 0 and 1"):
                run(prompt.repeat(2, 0), np.array([[1] * 9, [1] * 8 + [value]]))
        with pytest.raises(UserError, match="attention_mask are texts of different lengths"):
            run(prompt, [[1] * 9, [1]])
        with pytest.raises(UserError, match="input_ids hold 131, the model has 0 to 130"):
            run([[5, 6], [5, 131]])
    with pytest.raises(UserError, match=r"input_ids \[2, 0\] hold no token"):
        model.logits(np.zeros((2, 0)))
    with pytest.raises(UserError, match=r"position_ids \[1, 3\] are not \[1, 9\]: give one for every new token"):
        model.logits(prompt, position_ids=np.arange(3)[None])
    with pytest.raises(UserError, match="position_ids are texts of different lengths"):
        model.logits(prompt, position_ids=[[0, 1], [0]])
    for count in (-3, 2.5, "7"):
        with pytest.raises(UserError, match=f"max_new_tokens is {count!r}"):
            next(model.generate(prompt, max_new_tokens=count))
    assert not list(model.generate(prompt, max_new_tokens=0))
    with pytest.raises(
        UserError, match="chunk_size is 0: give how many of the prompt's tokens to run at once, 1 or more"
    ):
        next(model.generate(prompt, chunk_size=0))
    for setting in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="is not in"):
            next(model.generate(prompt, **{"temperature": 1.0} | setting))
    for name, value in (("top_k", 0), ("top_k", 50.0), ("seed", -1), ("seed", 1.5)):
        with pytest.raises(UserError, match=f"{name} is {value}: give"):
            next(model.generate(prompt, temperature=1.0, **{name: value}))
    with pytest.raises(UserError, match=r"eos_ids \['</s>'\] are no token ids"):
        next(model.generate(prompt, eos_ids=["</s>"]))
    with pytest.raises(UserError, match=r"no memory for keys and values of 1 x \d+ tokens"):
        next(model.generate(prompt, max_new_tokens=10**12))


def test_a_cache_must_be_that_of_the_same_texts(model, prompt):
    _, past = model.forward(prompt[:, :8])
    for shape in ((1, 1), (1, 8), (1, 13)):  # the first would write over the first slot
        with pytest.raises(UserError, match=rf"attention_mask \{list(shape)} is not \[1, 9\].*cached ones before new"):
            model.forward(prompt[:, 8:], np.ones(shape), past=past)
    with pytest.raises(UserError, match=r"past_key_values.0.key is float32 \[1, 2, 8, 8\], not float32 \[2, 2, 8, 8\]"):
        model.forward(prompt[:, 8:].repeat(2, 0), past=past)
    with pytest.raises(
        UserError, match=r"past_key_values.0.value is float32 \[1, 2, 5, 8\], not float32 \[1, 2, 8, 8\]"
    ):
        model.forward(prompt[:, 8:], past=[past[0], past[1][:, :, :5], *past[2:]])
    with pytest.raises(UserError, match=r"past_key_values.0.key is float16"):
        model.forward(prompt[:, 8:], past=[part.astype(np.float16) for part in past])
    with pytest.raises(UserError, match=r"past_key_values.0.key is float64 \[1, 2, 8, 8\], not float32"):
        model.forward(prompt[:, 8:], past=[part.tolist() for part in past])
    with pytest.raises(UserError, match="past holds 5 arrays, not 6"):
        model.forward(prompt[:, 8:], past=past[1:])
    logits, _ = model.forward(prompt[:, 8:], np.ones((1, 9)), np.array([[8]]), past)
    np.testing.assert_allclose(logits[:, 0], model.logits(prompt)[:, -1], atol=1e-4)


def test_a_text_that_has_ended_counts_nowhere(model):
    """What it is fed is padding: it executes nothing, and what is saved is the other text's."""
    ids = np.random.default_rng(8).integers(3, 131, (2, 6))
    free = generate(model, ids, tokens=20)
    end = int(next(token for token in free[0] if token not in free[1]))
    alone = [model.saved for _ in model.generate(ids[1:], max_new_tokens=20, eos_ids=())]
    together = [model.saved for _ in model.generate(ids, max_new_tokens=20, eos_ids=end)]
    stop = free[0].tolist().index(end) + 1
    assert len(together) == 20 > stop
    assert together[stop:] == pytest.approx(alone[stop:], abs=1e-6)


def test_what_is_no_number_is_no_token(model, monkeypatch):
    def overflowed(self: Buffers, *given: object) -> dict[str, np.ndarray]:
        outputs = run(self, *given)
        logits = outputs["logits"].copy()
        logits[1, -1, 7] = np.nan
        return outputs | {"logits": logits}

    run = Buffers.run
    monkeypatch.setattr(Buffers, "run", overflowed)
    ids = np.random.default_rng(0).integers(3, 131, (2, 6))
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="gives NaN in place of logits"):
            generate(model, ids, tokens=2, temperature=temperature)


def test_what_has_ended_may_be_no_number(model, monkeypatch):
    """It is fed padding, whose logits nobody reads."""

    def overflowed(self: Buffers, feed: dict[str, np.ndarray], *rest: object) -> dict[str, np.ndarray]:
        outputs = run(self, feed, *rest)
        logits = outputs["logits"].copy()
        if feed["input_ids"].shape[1] == 1:
            logits[0] = np.nan
        return outputs | {"logits": logits}

    run, ids = Buffers.run, np.random.default_rng(8).integers(3, 131, (2, 6))
    free = generate(model, ids, tokens=4)
    end = int(free[0, 0])
    assert end not in free[1]
    monkeypatch.setattr(Buffers, "run", overflowed)
    np.testing.assert_array_equal(generate(model, ids, tokens=4, eos_ids=end)[1], free[1])

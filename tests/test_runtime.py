"""The ONNX runtime: generation with the cache, in batches, sampling, and errors that say what to do."""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import random_routing, save_random
from transformers import PreTrainedTokenizerFast

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.families import UNITS
from ir_convert.flops import Budget
from ir_convert.routing import Curve
from ir_convert.runtime import OnnxModel
from ir_convert.runtime import model as runtime_model
from ir_convert.runtime.loading import inspect, warn_if_slow

NO_END: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers model, folder of its export) with a sliding window, which caches find hardest."""
    path = tmp_path_factory.mktemp("base")
    torch.set_num_threads(1)
    model = save_random("mistral-sliding", path)
    checkpoint = Checkpoint.open(str(path))
    folder = tmp_path_factory.mktemp("onnx")
    write(checkpoint, random_routing(checkpoint), folder, "ir-tiny.onnx")
    return model, folder


@pytest.fixture
def model(base):
    return OnnxModel.load(base[1], threads=1)


@pytest.fixture
def prompt():
    return np.random.default_rng(3).integers(3, 131, (1, 9))


def generate(
    model: OnnxModel, ids: np.ndarray, mask: np.ndarray | None = None, tokens: int = 64, **kwargs
) -> np.ndarray:
    return np.stack(list(model.generate(ids, mask, tokens, **({"eos_ids": NO_END} | kwargs))), axis=1)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.4])
def test_cache_changes_nothing(model, prompt, sparsity):
    model.set_sparsity(sparsity)
    tokens = prompt
    for _ in range(64):
        tokens = np.concatenate([tokens, model.logits(tokens)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generate(model, prompt), tokens[:, 9:])


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


def test_sparsity(base, model):
    assert model.threshold == pytest.approx(model.curve.at(0.4))
    model.set_sparsity(0)
    assert model.threshold == -math.inf
    with pytest.raises(UserError, match="out of reach"):
        model.set_sparsity(0.99)
    for sparsity in (-1, math.nan):
        with pytest.raises(UserError, match="not in"):
            model.set_sparsity(sparsity)
    assert OnnxModel.load(base[1] / "ir-tiny.onnx", sparsity=0.2).threshold == pytest.approx(model.curve.at(0.2))
    assert OnnxModel.load(base[1], threshold=1.5).threshold == 1.5
    assert model.eos_ids == {2}


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_holds_a_sparsity_that_the_curve_misses(tmp_path, kv_cache):
    """Random scores straddle 0, which saves about 0.4; this curve is off by 2. Half of each batch is padding."""
    (tmp_path / "base").mkdir()
    (tmp_path / "onnx").mkdir()
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    routing = random_routing(checkpoint, kv_cache=kv_cache)
    routing.curve = Curve([0.2, 0.4, 0.6], [-3.0, -2.0, -1.0])
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx")
    model, generator = OnnxModel.load(tmp_path / "onnx", threads=1), np.random.default_rng(0)
    model.threshold = 0.5
    mask = np.repeat([[0, 1]], 128, axis=1).repeat(2, axis=0)

    def run() -> float:
        model.logits(generator.integers(3, 131, (2, 256)), mask)
        return model.saved

    with model.hold_sparsity(0.4) as control:
        assert model.threshold == -2.0
        saved = [run() for _ in range(30)]
        assert model.threshold == control.threshold > -1.0
    assert saved[0] < 0.3
    assert abs(np.mean(saved[-10:]) - 0.4) < 0.02
    run()
    assert model.threshold == 0.5
    with pytest.raises(UserError, match="out of reach"), model.hold_sparsity(0.61):
        pass
    with pytest.raises(ValueError, match="gain 0 does not lead"), model.hold_sparsity(0.4, gain=0):
        pass

    with model.hold_sparsity(0.4) as control:
        model.set_sparsity(0)
        assert [run() <= 0 for _ in range(3)] == [True] * 3
        model.set_sparsity(0.2)
        saved = [run() for _ in range(20)]
        assert control.sparsity == 0.2
    assert abs(np.mean(saved[-8:]) - 0.2) < 0.03

    with model.hold_sparsity(0.4, gain=1.0):  # 256 real tokens in single steps move it once, and padding never does
        first = model.threshold
        for _ in range(255):
            model.logits(np.array([[5], [7]]), np.array([[1], [0]]))
        assert model.threshold == first
        model.logits(np.array([[5], [7]]), np.array([[1], [0]]))
        assert model.threshold == pytest.approx(first + 0.4 - model.saved)


def test_tokenizer_from_the_folder(base, model, tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        _ = model.tokenizer
    from tokenizers import Tokenizer, models

    folder = shutil.copytree(base[1], tmp_path / "with")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    ).save_pretrained(folder)
    assert OnnxModel.load(folder).tokenizer("a").input_ids == [0]


def test_errors_say_what_to_do(base, model, tmp_path, prompt):
    with pytest.raises(UserError, match="does not exist"):
        OnnxModel.load(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match=r"0 \.onnx files"):
        OnnxModel.load(tmp_path)
    with pytest.raises(UserError, match="padded on the left"):
        next(model.generate(prompt, np.array([[1] * 8 + [0]])))
    for nothing in (np.zeros((1, 0)), np.zeros((0, 3))):
        with pytest.raises(UserError, match="prompts of at least one token"):
            next(model.generate(nothing))
    for ids, message in (
        ([[1, 2], [3]], "texts of different lengths: pad them"),
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
                run(prompt, np.full((1, 9), value))
        with pytest.raises(UserError, match="input_ids hold 131, the model has 0 to 130"):
            run([[5, 131]])
    with pytest.raises(UserError, match=r"input_ids \[2, 0\] hold no token"):
        model.logits(np.zeros((2, 0)))
    with pytest.raises(UserError, match=r"position_ids \[1, 3\] are not \[1, 9\]: give one for every new token"):
        model.logits(prompt, position_ids=np.arange(3)[None])
    with pytest.raises(UserError, match="max_new_tokens -3 is negative"):
        next(model.generate(prompt, max_new_tokens=-3))
    assert not list(model.generate(prompt, max_new_tokens=0))
    for setting in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="top_k 0 leaves no token" if "top_k" in setting else "is not in"):
            next(model.generate(prompt, **{"temperature": 1.0} | setting))
    with pytest.raises(UserError, match=r"no memory for keys and values of 1 x \d+ tokens"):
        next(model.generate(prompt, max_new_tokens=10**12))
    with pytest.raises(UserError, match=r"no provider 'FooProvider' here, but: .*CPUExecutionProvider"):
        OnnxModel.load(base[1], providers=["FooProvider"])
    assert OnnxModel.load(base[1], providers="CPUExecutionProvider").session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="threshold is NaN"):
        OnnxModel.load(base[1], threshold=math.nan)
    before = model.threshold
    with pytest.raises(TypeError), model.hold_sparsity(0.2, gian=3):
        pass
    assert model.threshold == before

    lone = shutil.copyfile(base[1] / "ir-tiny.onnx", tmp_path / "ir-tiny.onnx")
    with pytest.raises(UserError, match=r"needs its weights 'ir-tiny.onnx.data' beside it"):
        OnnxModel.load(lone)
    whole = (base[1] / "ir-tiny.onnx.data").read_bytes()
    (tmp_path / "ir-tiny.onnx.data").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="shorter"):
        OnnxModel.load(lone)

    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"\xff\xfenot a model")
    with pytest.raises(UserError, match="not an ONNX file"):
        OnnxModel.load(noise)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", [x], [y])), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not written by ir-convert"):
        OnnxModel.load(tmp_path / "other.onnx")


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
    with pytest.raises(UserError, match="past holds 5 arrays, not 6"):
        model.forward(prompt[:, 8:], past=past[1:])
    logits, _ = model.forward(prompt[:, 8:], np.ones((1, 9)), np.array([[8]]), past)
    np.testing.assert_allclose(logits[:, 0], model.logits(prompt)[:, -1], atol=1e-4)


def test_what_is_yielded_is_the_callers(model, prompt):
    expected = generate(model, prompt, tokens=8)
    found = []
    for token in model.generate(prompt, max_new_tokens=8, eos_ids=NO_END):
        found.append(token.copy())
        token += 1
    assert (np.stack(found, axis=1) == expected).all()


def test_a_provider_that_does_not_start(base, monkeypatch):
    """ONNX Runtime goes on without it, on the CPU, where other kernels and precisions are right."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(UserError, match=r"CUDAExecutionProvider does not start here.*providers=\['CPUExec"):
        OnnxModel.load(base[1], both, library=False)
    monkeypatch.setattr(runtime_model, "default_providers", lambda: both)
    with pytest.raises(UserError, match="does not start here"):  # in whose options kernels for it may be by now
        OnnxModel.load(base[1], options=ort.SessionOptions())
    with pytest.warns(UserWarning, match="does not start here.*the model runs on the CPU"):
        model = OnnxModel.load(base[1])
    assert model.session.get_providers() == ["CPUExecutionProvider"]


def test_one_end_token(model, prompt):
    end = int(generate(model, prompt, tokens=5)[0, 3])
    np.testing.assert_array_equal(generate(model, prompt, eos_ids=end), generate(model, prompt, eos_ids=[end]))


def test_options_with_native_kernels_serve_one_load(base, library, prompt):
    options = ort.SessionOptions()
    for _ in range(2):
        OnnxModel.load(base[1], threads=1, options=options, library=False)
    model = OnnxModel.load(base[1], threads=1, options=options, library=library)
    for again in (library, False):
        with pytest.raises(UserError, match="session options hold native kernels already: give every load"):
            OnnxModel.load(base[1], threads=1, options=options, library=again)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    with pytest.raises(UserError, match="or library=False to keep the kernels that they hold"):
        OnnxModel.load(base[1], threads=1, options=options, library=library)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    kept = OnnxModel.load(base[1], threads=1, options=options, library=False)
    np.testing.assert_array_equal(kept.logits(prompt), model.logits(prompt))


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


def test_trace(tmp_path):
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    routing = random_routing(checkpoint)
    del routing.units[1, "mlp"]
    (tmp_path / "onnx").mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx", trace=True)
    model = OnnxModel.load(tmp_path / "onnx", threads=1, threshold=0.0)
    mask = np.ones((2, 60), np.int64)
    mask[0, :4] = 0
    model.forward(np.random.default_rng(0).integers(3, 131, mask.shape), mask)
    assert model.executed is not None
    assert model.executed.shape == (3, 2, 2, 60)
    assert not model.executed[:, :, 0, :4].any()
    np.testing.assert_array_equal(model.executed[1, 1], mask.astype(bool))
    budget = Budget.of(checkpoint.config, routing.units)
    rates = {
        (layer, unit): 1 - float(model.executed[layer, UNITS.index(unit)].sum()) / mask.sum()
        for layer, unit in routing.units
    }
    assert model.saved == pytest.approx(budget.sparsity(rates), abs=1e-5)
    assert any(0.05 < rate < 0.95 for rate in rates.values())


@pytest.mark.parametrize(
    ("kv_cache", "dtype", "provider", "library", "warned"),
    [
        ("full", torch.float32, "CUDAExecutionProvider", None, True),
        ("full", torch.float32, "CUDAExecutionProvider", Path("libir_ops.so"), False),
        ("full", torch.float16, "CUDAExecutionProvider", None, False),
        ("full", torch.float32, "CPUExecutionProvider", None, False),
        ("strict", torch.float32, "CUDAExecutionProvider", None, False),  # its steps know no GroupQueryAttention
    ],
)
def test_warns_of_slow_steps_on_a_gpu(kv_cache, dtype, provider, library, warned, tmp_path):
    save_random("llama", tmp_path / "base")
    checkpoint, folder = Checkpoint.open(str(tmp_path / "base")), tmp_path / "onnx"
    folder.mkdir()
    write(checkpoint, random_routing(checkpoint, kv_cache=kv_cache), folder, "m.onnx", dtype)
    with warnings.catch_warnings(record=True) as caught:
        warn_if_slow(inspect(folder / "m.onnx"), [provider], library)
    assert [("--dtype float16" in str(warning.message)) for warning in caught] == [True] * warned

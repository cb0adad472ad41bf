"""The base model as int4 leaves its units: what reads as quantised, and that a calibration runs on it."""

import math
from dataclasses import replace

import pytest
import torch
from calibrations import random_blocks, shorten
from models import CONFIGS, save_random
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ir_convert import quantisation
from ir_convert.calibrate import Options, calibrate
from ir_convert.calibrate.endtoend.gates import Gates
from ir_convert.calibrate.endtoend.model import RoutedModel
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.evaluate import measure
from ir_convert.export.onnx import int8
from ir_convert.export.onnx.int4 import Int4, dequantised
from ir_convert.outputs import Output
from ir_convert.quantisation import Int4Rounding, onnx_bytes
from ir_convert.routing import Routing

PROJECTION = "model.layers.1.mlp.up_proj.weight"


def opened(name, path) -> tuple[PreTrainedModel, Checkpoint]:
    model = save_random(name, path)
    return model, Checkpoint.open(str(path))


@pytest.fixture
def llama(tmp_path) -> tuple[PreTrainedModel, Checkpoint]:
    return opened("llama", tmp_path / "llama")


def by_hand(model: PreTrainedModel, int4: Int4) -> PreTrainedModel:
    """Quantises and dequantises, in place, the linear layers of a model without packed projections or experts."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = dequantised(module.weight.data, int4)
    return model


def lora_for(checkpoint: Checkpoint, name: str = PROJECTION, scale: float = 0.1) -> dict:
    generator = torch.Generator().manual_seed(3)
    outputs, inputs = checkpoint.read(name).shape
    a, b = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
    return {name: (a, b * scale)}


@pytest.mark.parametrize("name", CONFIGS)
def test_projections_alone_are_quantised(name, tmp_path):
    _, checkpoint = opened(name, tmp_path)
    view = checkpoint.quantised(Int4Rounding(Int4()))
    changed = {name for name in checkpoint.shards if not torch.equal(view.read(name), checkpoint.read(name))}
    units = ("self_attn", "mlp")
    expected = {
        name
        for name in checkpoint.shards
        if any(f".{unit}." in name for unit in units)
        and checkpoint.read(name).ndim > 1
        and not name.endswith("mlp.gate.weight")
    }
    assert changed == expected
    assert len(expected) >= 4 * checkpoint.config.num_hidden_layers
    for name in expected:
        weight = checkpoint.read(name)
        # RTN takes each row by itself, so packed tensors and stacks of experts are quantised as they are.
        whole = dequantised(weight.reshape(-1, weight.shape[-1]), Int4()).reshape(weight.shape)
        assert torch.equal(view.read(name), whole)


def test_packed_projections_are_quantised_one_by_one(tmp_path):
    """As an exporter that takes them apart does: HQQ looks at a tensor as a whole."""

    class Recorded:
        def __init__(self):
            self.seen = {}

        def __call__(self, weight, name):
            self.seen[name] = tuple(weight.shape)
            return dequantised(weight, Int4("hqq"))

    _, checkpoint = opened("phi3", tmp_path)
    name, recorded = "model.layers.0.self_attn.qkv_proj.weight", Recorded()
    got = checkpoint.quantised(recorded).read(name)
    assert recorded.seen == {f"{name}.0": (48, 48), f"{name}.1": (16, 48), f"{name}.2": (16, 48)}
    parts = [dequantised(part, Int4("hqq")) for part in checkpoint.read(name).split([48, 16, 16])]
    assert torch.equal(got, torch.cat(parts))


@pytest.mark.parametrize("order", ["lora first", "lora last"])
def test_low_rank_changes_are_folded_in_before(order, llama, tmp_path):
    _, checkpoint = llama
    lora, rounding = lora_for(checkpoint), Int4Rounding(Int4(), tmp_path / "kept")
    checkpoint.quantised(rounding).read(PROJECTION)  # kept as it is without the change: must not come back with it
    view = (
        checkpoint.with_lora(lora).quantised(rounding)
        if order == "lora first"
        else checkpoint.quantised(rounding).with_lora(lora)
    )
    a, b = lora[PROJECTION]
    assert torch.equal(view.read(PROJECTION), dequantised(checkpoint.read(PROJECTION) + b @ a, Int4()))


def test_precision_is_the_kernels(tmp_path):
    """Quantised weights of a bfloat16 model are not rounded to bfloat16 again where more is asked for."""
    opened("llama", tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path))
    view = checkpoint.quantised(Int4Rounding(Int4()))
    exact = dequantised(checkpoint.read(PROJECTION), Int4())
    assert torch.equal(view.read(PROJECTION, torch.float32), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)
    assert view.read(PROJECTION).dtype == view.stored_dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["rtn", "hqq", "k_quant"])
def test_weights_are_quantised_once(method, llama, tmp_path, monkeypatch):
    _, checkpoint = llama
    view = checkpoint.quantised(Int4Rounding(Int4(method), tmp_path / "kept"))
    first = view.read_layer(1)
    monkeypatch.setattr(quantisation, "quantise", None)
    again = view.read_layer(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):
        view.read_layer(2)


def test_view_knows_what_the_checkpoint_does(llama):
    _, checkpoint = llama
    known = checkpoint.weights_sha256
    for path in checkpoint.path.glob("*.safetensors"):
        path.unlink()  # hashing again would fail
    assert checkpoint.quantised(Int4Rounding(Int4())).with_lora({}).weights_sha256 == known


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_models_run_on_quantised_weights(method, llama):
    """The streamed model, which the local recipe runs, and the whole one, which is trained."""
    model, checkpoint = llama
    view, ids = checkpoint.quantised(Int4Rounding(Int4(method))), random_blocks().test
    with torch.no_grad():
        unquantised, expected = model(ids).logits, by_hand(model, Int4(method))(ids).logits
        trained, _ = RoutedModel(view, {})(ids, Gates("dense"))
    torch.testing.assert_close(trained, expected, atol=1e-4, rtol=1e-4)
    assert (expected - unquantised).abs().max() > 0.05
    streamed = measure(Decoder(view, torch.device("cpu")), {}, ids, []).quality(0).perplexity
    assert streamed == pytest.approx(perplexity(model, ids), rel=1e-4)


def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [float(model(block[None], labels=block[None]).loss) for block in ids]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    "options",
    [Options(), Options(polish=2), Options(recipe="greedy", steps=2), Options(recipe="paper", steps=2, lora=True)],
    ids=["local", "polish", "greedy", "lora"],
)
def test_calibration_sees_the_quantised_weights(options, llama, tmp_path, monkeypatch):
    shorten(monkeypatch)
    model, checkpoint = llama
    options = replace(options, sparsity=0.2, rank=None if options.recipe == "greedy" else 3, router_width=4)
    view = checkpoint.quantised(Int4Rounding(Int4("rtn_asym"), tmp_path / "kept"))
    calibrate(view, random_blocks(), options).save(tmp_path / "r.safetensors")
    routing = Routing.load(tmp_path / "r.safetensors")
    assert routing.quantised_units == {"bits": 4, "block": 32, "method": "rtn_asym"}
    assert routing.metadata["weights_sha256"] == checkpoint.weights_sha256
    unquantised = perplexity(model, random_blocks().test)
    expected = perplexity(by_hand(model, Int4("rtn_asym")), random_blocks().test)
    assert routing.metadata["test"]["perplexity_dense"] == pytest.approx(expected, rel=1e-4)
    assert abs(unquantised / expected - 1) > 1e-3


def test_unquantised_routing_says_nothing(llama, monkeypatch):
    shorten(monkeypatch)
    routing = calibrate(llama[1], random_blocks(), Options(sparsity=0.2, rank=3, router_width=4))
    assert routing.quantised_units is None
    assert "quantised_units" not in routing.metadata


@pytest.mark.parametrize("method", ["rtn", "hqq", "k_quant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_size_is_known_before(method, dtype, llama):
    _, checkpoint = llama
    expected = 0
    for name in checkpoint.shards:
        weight = checkpoint.read(name)
        if "_proj.weight" in name:
            parts = quantisation.quantise(weight, Int4(method)).parts().values()
            expected += sum(part.numel() * (1 if part.dtype == torch.uint8 else dtype.itemsize) for part in parts)
        elif name != checkpoint.family.head:
            expected += weight.numel() * dtype.itemsize
    packed, scales = int8.quantise(checkpoint.read(checkpoint.family.head))
    expected += packed.numel() + scales.numel() * dtype.itemsize
    # The file's own header is counted as weights.
    assert 0 <= onnx_bytes(checkpoint, dtype, Int4(method)) - expected < 10_000
    assert onnx_bytes(checkpoint, dtype, Int4(method)) < 0.9 * onnx_bytes(checkpoint, dtype, None)


@pytest.mark.parametrize(
    ("calibrated", "flags", "output", "said"),
    [
        (None, {}, "m.onnx", None),
        (None, {"int4": True}, "m.onnx", "gets int4 units (rtn), and the routing was calibrated on unquantised units"),
        ("rtn", {"int4": True}, "m.onnx", None),
        ("rtn", {"int4": True}, "hf", "gets unquantised units, and the routing was calibrated on int4 units (rtn)"),
        ("rtn", {}, "m.onnx", "gets unquantised units"),
        ("hqq", {"int4": True}, "m.onnx", None),
        (
            "hqq",
            {"int4": True, "method": "rtn"},
            "m.onnx",
            "gets int4 units (rtn), and the routing was calibrated on int4",
        ),
        ("hqq", {"int4": True}, "r.safetensors", None),
    ],
)
def test_a_routing_for_other_units_is_remarked_upon(calibrated, flags, output, said, tmp_path):
    metadata = {"quantised_units": Int4(calibrated).facts()} if calibrated else {}
    routing = Routing({}, None, metadata)
    asked = quantisation.Quantisation(**flags).of(routing)
    if calibrated and flags == {"int4": True}:
        assert asked.setting.method == calibrated
    lines = asked.warnings(routing, [Output.parse(tmp_path / output)])
    assert [said in line for line in lines] == ([True] if said else [])

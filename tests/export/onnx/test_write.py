"""What lies in the folder afterwards, and what is refused."""

import hashlib
import json
import math
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import CONFIGS, random_routing, save_random
from onnx_reference import Batch, Reference, run_pieces
from transformers import AutoConfig, AutoModelForCausalLM

import ir_convert
from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write, writer
from ir_convert.export.onnx.metadata import metadata
from ir_convert.export.onnx.rotary import frequencies
from ir_convert.families import UNITS
from ir_convert.routing import Routing
from ir_convert.runtime import OnnxModel
from ir_convert.units import Forecaster, Router


def batch_of(length: int = 12) -> Batch:
    ids = torch.randint(3, 131, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return Batch(ids, mask, [length])


def test_folder(exported, random_model):
    model, _ = exported
    folder, (name, _, checkpoint, routing) = model.path.parent, random_model
    names = {
        "ir-tiny.onnx",
        "ir-tiny.onnx.data",
        "ir-tiny.routing.safetensors",
        "config.json",
        "generation_config.json",
        "genai_config.json",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert AutoConfig.from_pretrained(folder).model_type == CONFIGS[name].model_type
    assert Routing.load(folder / "ir-tiny.routing.safetensors").curve == routing.curve
    onnx.checker.check_model(model.path, full_check=True)

    proto = onnx.load(model.path, load_external_data=False)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 24, "ir": 1, "com.microsoft": 1}
    external = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    assert external
    for tensor in external:
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert where["location"] == "ir-tiny.onnx.data"
    assert model.path.stat().st_size < 200_000
    layer = [node.op_type for node in proto.graph.node if node.name.startswith("layers.1.attention/")]
    assert layer.count("RoutedAttention") == 1
    assert "layers.1.attention.execute" in {output for node in proto.graph.node for output in node.output}

    said = model.metadata
    assert said["version"] == ir_convert.__version__
    assert said["base_model"] == checkpoint.public_name
    assert said["sparsity_curve"] == {"sparsity": routing.curve.sparsity, "threshold": routing.curve.threshold}
    assert (said["sparsity"], said["threshold"], said["kv_cache"]) == (0.4, routing.threshold, "full")
    assert said["rank"] == {unit: [5, 5, 5] for unit in UNITS}
    assert said["router_width"] == {unit: [4, 4, 4] for unit in UNITS}


def test_tied_weights_are_stored_once(exported):
    model, reference = exported
    config = reference.model.config
    proto = onnx.load(model.path, load_external_data=False)
    vocabulary = [tensor.name for tensor in proto.graph.initializer if config.vocab_size in tensor.dims]
    assert len(vocabulary) == (1 if config.tie_word_embeddings else 2)


def test_reads_few_tensors_at_a_time(random_model, tmp_path, monkeypatch):
    _, _, checkpoint, routing = random_model
    alive: dict[str, weakref.ref] = {}
    read, large, progress = checkpoint.read, [], []

    def spy(self: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert sum(tensor() is not None for tensor in list(alive.values())) < writer.WORKERS
        tensor = read(name, dtype)
        alive[name] = weakref.ref(tensor)
        large.extend([name] if tensor.nbytes >= 1024 else [])
        return tensor

    monkeypatch.setattr(Checkpoint, "read", spy)
    write(checkpoint, routing, tmp_path, "m.onnx", on_progress=lambda done, total: progress.append((done, total)))
    packed = checkpoint.family.attention.packed | checkpoint.family.mlp.packed
    times = {name: len(packed.get(name.split(".")[-2], [name])) for name in large}  # once for each projection
    assert Counter(large) == times
    assert progress[-1][0] == progress[-1][1] == len(progress)


def test_sharded_source_is_the_same(tmp_path):
    data = []
    for folder, size in (("whole", "5GB"), ("sharded", "60KB")):
        save_random("llama-bias", tmp_path / folder, max_shard_size=size)
        checkpoint = Checkpoint.open(str(tmp_path / folder))
        out = tmp_path / f"{folder}-onnx"
        out.mkdir()
        write(checkpoint, random_routing(checkpoint), out, "m.onnx")
        data.append((out / "m.onnx.data").read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert data[0] == data[1]


def test_units_differ_in_rank_and_width(random_model, tmp_path, monkeypatch):
    """Rank 0 forecasts the bias alone, a router of width 0 scores all tokens alike; as large models have them, in the data file."""
    monkeypatch.setattr(writer, "INLINE_BYTES", 64)
    _, model, checkpoint, routing = random_model
    d = checkpoint.config.hidden_size
    units = dict(routing.units)
    for (key, unit), rank in zip(routing.units.items(), [0, 1, 5, 0, 7, 2], strict=True):
        down, up = torch.randn(rank, d) * 0.1, torch.randn(d, rank) * 0.3
        forecaster = Forecaster(down, torch.randn(rank), up, torch.randn(d) * 0.1)
        width = rank
        router = Router(torch.randn(width, d) * 0.2, torch.randn(width), torch.randn(1, width), torch.randn(1))
        units[key] = replace(unit, forecaster=forecaster, router=router)
    routing = replace(routing, units=units)
    write(checkpoint, routing, tmp_path, "m.onnx")
    batch, reference = batch_of(), Reference(model, routing, {})
    for threshold in (-0.1, math.inf):
        expected = reference(batch.ids, batch.mask, threshold)
        got = run_pieces(OnnxModel.load(tmp_path, threads=1, threshold=threshold), batch)
        real = batch.mask.bool()
        torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


def test_float16(random_model, tmp_path):
    _, model, checkpoint, routing = random_model
    write(checkpoint, routing, tmp_path, "m.onnx", dtype=torch.float16)
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    batch, reference = batch_of(), Reference(model, routing, {})
    half = OnnxModel.load(tmp_path, threads=1)
    real = batch.mask.bool()
    for threshold in (-math.inf, math.inf):  # between them, rounding may flip a decision
        half.threshold = threshold
        got, expected = run_pieces(half, batch), reference(batch.ids, batch.mask, threshold)
        assert got.dtype == torch.float16
        off = (got.float() - expected)[real].abs().amax(-1) >= 0.02 * expected.abs().max()
        # Rounding may flip a token's choice of experts, and no more than that.
        assert off.sum() <= (1 if checkpoint.family.mlp.experts and threshold < 0 else 0)
    half.set_sparsity(0.3)
    assert torch.isfinite(run_pieces(half, batch)).all()


def test_positions_are_not_rounded_in_float16(tmp_path):
    """Angles of a long text's tokens need more digits: attention sees distances alone, wherever a text begins."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx", dtype=torch.float16)
    model, ids = OnnxModel.load(tmp_path, threads=1, threshold=-math.inf), np.arange(5, 17)[None]
    near, far = (model.logits(ids, position_ids=np.arange(12)[None] + start).astype(np.float32) for start in (0, 5000))
    assert np.abs(near - far).max() < 0.02 * np.abs(near).max()


def test_norms_of_a_bfloat16_checkpoint_are_not_rounded_again(tmp_path):
    """1 is added to them, in more digits than bfloat16 has."""
    save_random("gemma3", tmp_path / "base").bfloat16().save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx")
    name = "model.layers.1.input_layernorm.weight"
    (found,) = [tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if tensor.name == name]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(found), 1 + checkpoint.read(name).float().numpy())


SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def checkpoint_with(path: Path, family: str, **values: object) -> tuple[torch.nn.Module, Checkpoint]:
    """A checkpoint whose config.json says something else."""
    save_random(family, path)
    config = json.loads((path / "config.json").read_text())
    if "rope_scaling" in values:  # as older and newer transformers write it
        config.pop("rope_parameters", None)
    (path / "config.json").write_text(json.dumps(config | values))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), Checkpoint.open(str(path))


def assert_computes(
    model: torch.nn.Module, checkpoint: Checkpoint, out: Path, batch: Batch, *thresholds: float
) -> None:
    """Holds the export of a random routing against the reference."""
    out.mkdir()
    routing = random_routing(checkpoint)
    write(checkpoint, routing, out, "m.onnx")
    exported, reference = OnnxModel.load(out, threads=1), Reference(model, routing, {})
    real = batch.mask.bool()
    for exported.threshold in thresholds:
        expected = reference(batch.ids, batch.mask, exported.threshold)
        got = run_pieces(exported, batch)
        torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "llama") for kind in SCALED), ("yarn", "smollm3")],  # the last has layers that do not rotate, nor scale
)
def test_scaled_rotary_embeddings(tmp_path, kind, family):
    model, checkpoint = checkpoint_with(tmp_path / "base", family, rope_theta=10000.0, rope_scaling=SCALED[kind])
    assert (frequencies(checkpoint.config)[1] != 1) == (kind == "yarn")
    assert_computes(model, checkpoint, tmp_path / "onnx", batch_of(40), -math.inf)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_every_norm_has_the_models_epsilon(family, tmp_path):
    """Which is too small to show, otherwise."""
    model, checkpoint = checkpoint_with(tmp_path / "base", family, rms_norm_eps=0.3)
    assert_computes(model, checkpoint, tmp_path / "onnx", batch_of(), -math.inf, 0.0)


def test_refuses_length_dependent_rotary_embeddings(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    _, checkpoint = checkpoint_with(tmp_path / "base", "llama", rope_theta=10000.0, rope_scaling=scaling)
    with pytest.raises(UserError, match="'dynamic'"):
        frequencies(checkpoint.config)


def test_refusals(random_model, tmp_path):
    _, _, checkpoint, routing = random_model
    with pytest.raises(UserError, match="float64 is not supported in ONNX; choose float32 or float16 or bfloat16"):
        write(checkpoint, routing, tmp_path, "m.onnx", dtype=torch.float64)
    for layer in (3, 4):
        long = replace(routing, units=routing.units | {(layer, "mlp"): routing.units[0, "mlp"]})
        with pytest.raises(UserError, match=rf"for {layer + 1} layers.*has 3"):
            write(checkpoint, long, tmp_path, "m.onnx")
    assert not list(tmp_path.iterdir())


def test_refuses_weights_that_overflow(tmp_path):
    model = save_random("qwen2", tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    model.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    out = tmp_path / "onnx"
    out.mkdir()
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight.*float16"):
        write(checkpoint, random_routing(checkpoint), out, "m.onnx", dtype=torch.float16)


def test_loads_from_the_hub_cache(tmp_path):
    """There every file is a link into a folder of blobs; the base model's files as well as ours."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(hub_cache(tmp_path / "base", tmp_path / "hub" / "models--someone--base")))
    out = tmp_path / "onnx"
    out.mkdir()
    write(checkpoint, random_routing(checkpoint), out, "m.onnx")
    expected = OnnxModel.load(out, threads=1).logits(np.array([[5, 6, 7]]))
    model = OnnxModel.load(hub_cache(out, tmp_path / "hub" / "models--someone--routed"), threads=1)
    np.testing.assert_array_equal(model.logits(np.array([[5, 6, 7]])), expected)


def hub_cache(folder: Path, cache: Path) -> Path:
    """Moves a folder's files where the Hub's cache would keep them; returns the folder of links that it loads from."""
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list(folder.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_sparsity_0_is_json(tmp_path):
    save_random("llama", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    routing = random_routing(checkpoint)
    said = metadata(checkpoint, replace(routing, metadata=routing.metadata | {"sparsity": 0.0}))
    assert json.loads(json.dumps(said, allow_nan=False))["threshold"] == "-inf"

"""A mixture of experts in ONNX: from either form on disk, and with weights that do not add up to 1."""

import json
import math
import re

import onnx_ir as ir
import pytest
import torch
from models import make_random
from onnx_reference import Batch, profile, run_pieces
from safetensors.torch import load_file, save_file
from stream_reference import StreamReference

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.experts import _pack
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4
from ir_convert.quantisation import Int4Rounding
from ir_convert.runtime import OnnxModel


@pytest.mark.parametrize("int4", [None, Int4("rtn_asym")])
def test_packed_on_disk(int4, tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    data = []
    for form in ("apart", "packed"):
        (tmp_path / form).mkdir()
        write(checkpoint, routing, tmp_path / form, "m.onnx", int4=int4)
        data.append((tmp_path / form / "m.onnx.data").read_bytes())
        pack(tmp_path / "base")
        checkpoint = Checkpoint.open(str(tmp_path / "base"))
    assert "model.layers.2.mlp.experts.gate_up_proj" in checkpoint.shards
    assert data[0] == data[1]


def pack(path) -> None:
    tensors = load_file(path / "model.safetensors")
    if any(name.endswith("experts.gate_up_proj") for name in tensors):
        return
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        inside = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        tensors |= {prefix + name: tensor for name, tensor in _pack(inside, "mlp.experts", 5).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("int4", [None, Int4(accuracy_level=1)])
def test_weights_as_the_softmax_gives_them(int4, tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    ids = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones_like(ids), []
    for normalize in (True, False):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"norm_topk_prob": normalize}))
        checkpoint = Checkpoint.open(str(tmp_path / "base"))
        folder = tmp_path / str(normalize)
        folder.mkdir()
        write(checkpoint, routing, folder, "m.onnx", int4=int4)
        seen = checkpoint if int4 is None else checkpoint.quantised(Int4Rounding(int4))
        expected = StreamReference(seen, routing)(ids, mask, -math.inf).logits
        found.append(run_pieces(OnnxModel.load(folder, threads=1, threshold=-math.inf), Batch(ids, mask, [9])))
        off = (found[-1] - expected).abs().max()
        assert off < 1e-4 if int4 is None else off < 0.1 * expected.std()  # the head alone rounds activations
    assert (found[0] - found[1]).std() > 0.2 * expected.std()


@pytest.mark.parametrize(("int4", "domain", "kernel"), [(None, "ir", "MoE"), (Int4(), "ir.int4", "QMoE")])
def test_is_one_function_on_stock_operators(int4, domain, kernel, tmp_path):
    """And its operator does not run where no token executes: on a GPU it refuses to."""
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    write(checkpoint, routing, tmp_path, "m.onnx", int4=int4)
    (function,) = [f for f in ir.load(tmp_path / "m.onnx").functions.values() if "MoE" in f.name]
    assert (function.domain, function.name) == (domain, "RoutedMoE")
    nodes = list(ir.traversal.RecursiveGraphIterator(function))
    assert {node.op_type for node in nodes if node.domain} == {kernel}

    model = OnnxModel.load(tmp_path, threads=1, library=False)
    ids = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), [9])
    for ran, times in zip(profile(model, batch, [-math.inf, math.inf], tmp_path), (3, 0), strict=True):
        assert [event["args"]["op_name"] for event in ran].count(kernel) == times


@pytest.mark.parametrize("int4", [None, Int4()])
def test_a_damaged_expert_is_named(int4, tmp_path):
    """Also where its shape would spread over the one that is right."""
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    name, path = "model.layers.1.mlp.experts.1.down_proj.weight", tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:, :1].contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(f"tensor '{name}' has shape [128, 1]; [128, 32] was expected")):
        write(checkpoint, routing, tmp_path, "m.onnx", int4=int4)


def test_the_configuration_of_mixtral_is_its_authors(tmp_path):
    """Its tensors have other names in the files; it is no part of another model."""
    _, _, checkpoint, routing = make_random("mixtral", tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in checkpoint.inside.values()
    (tmp_path / "onnx").mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx")
    assert (tmp_path / "onnx" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_what_int4_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(UserError, match="hqq is not for a mixture of experts"):
        write(checkpoint, routing, tmp_path / "onnx", "m.onnx", int4=Int4("hqq"))
    assert not list((tmp_path / "onnx").iterdir())

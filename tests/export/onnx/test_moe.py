"""A mixture of experts in ONNX: from either form on disk, and with weights that do not add up to 1."""

import json
import math

import onnx
import pytest
import torch
from models import make_random
from onnx_reference import Batch, run_pieces
from safetensors.torch import load_file, save_file
from stream_reference import StreamReference

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.experts import _pack
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4
from ir_convert.runtime import OnnxModel


def test_packed_on_disk(tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    data = []
    for form in ("apart", "packed"):
        (tmp_path / form).mkdir()
        write(checkpoint, routing, tmp_path / form, "m.onnx")
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


def test_weights_as_the_softmax_gives_them(tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    ids = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones_like(ids), []
    for normalize in (True, False):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"norm_topk_prob": normalize}))
        checkpoint = Checkpoint.open(str(tmp_path / "base"))
        folder = tmp_path / str(normalize)
        folder.mkdir()
        write(checkpoint, routing, folder, "m.onnx")
        expected = StreamReference(checkpoint, routing)(ids, mask, -math.inf).logits
        found.append(run_pieces(OnnxModel.load(folder, threads=1, threshold=-math.inf), Batch(ids, mask, [9])))
        torch.testing.assert_close(found[-1], expected, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_is_one_function_on_stock_operators(tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    write(checkpoint, routing, tmp_path, "m.onnx")
    (function,) = [f for f in onnx.load(tmp_path / "m.onnx", load_external_data=False).functions if "MoE" in f.name]
    assert function.name == "RoutedMoE"
    assert {node.domain for node in function.node} == {"", "com.microsoft"}


def test_int4_is_refused_before_anything_is_written(tmp_path):
    _, _, checkpoint, routing = make_random("qwen3_moe", tmp_path / "base")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(UserError, match="does not support int4 for a mixture of experts"):
        write(checkpoint, routing, tmp_path / "onnx", "m.onnx", int4=Int4())
    assert not list((tmp_path / "onnx").iterdir())

"""Experts are read from either form on disk into either form in memory."""

import torch
from models import make_random
from safetensors.torch import load_file, save_file

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder, load_layer
from ir_convert.experts import _pack, _unpack, fit_experts
from ir_convert.families import experts_of


def test_packed_on_disk(tmp_path):
    """As transformers 5 keeps them in memory; checkpoints that it writes have them apart."""
    _, _, checkpoint, _ = make_random("qwen3_moe", tmp_path)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        expected = run(checkpoint, ids)
        apart = load_file(tmp_path / "model.safetensors")
        packed, names = {}, [name for name in apart if ".experts." not in name]
        for layer in range(checkpoint.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            inside = {name.removeprefix(prefix): apart[name] for name in apart if name.startswith(prefix)}
            count = experts_of(checkpoint.config).count
            packed |= {prefix + name: tensor for name, tensor in _pack(inside, "mlp.experts", count).items()}
        packed |= {name: apart[name] for name in names if name not in packed}
        assert packed["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 2 * 32, 128)
        save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.testing.assert_close(run(Checkpoint.open(str(tmp_path)), ids), expected)


def run(checkpoint, ids):
    decoder = Decoder(checkpoint, torch.device("cpu"))
    x = decoder.embed(ids)
    for _, layer in decoder.layers():
        for unit in ("attention", "mlp"):
            x = x + layer.contribution(unit, x)
    return decoder.head()(x)


def test_there_and_back(tmp_path):
    _, model, checkpoint, _ = make_random("qwen3_moe", tmp_path)
    tensors = checkpoint.read_layer(0)
    packed = _pack(tensors, "mlp.experts", 5)
    again = _unpack(packed, "mlp.experts")
    assert again.keys() == tensors.keys()
    assert all(again[name].equal(tensor) for name, tensor in tensors.items())
    layer = model.model.layers[0]
    wanted = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for form in (tensors, packed):
        fitted = fit_experts(form, layer, "mlp.experts")
        assert fitted.keys() == wanted.keys()
        assert all(fitted[name].equal(tensor) for name, tensor in wanted.items())
    load_layer(layer, checkpoint, 0, torch.float32, torch.device("cpu"))
    assert all(tensor.equal(wanted[name]) for name, tensor in layer.state_dict().items())

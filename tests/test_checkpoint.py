"""Opening a base model: sharded, tied either way, damaged, hostile."""

import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from models import edit, random_routing, save_random
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ir_convert import checkpoint as module
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.errors import UserError
from ir_convert.export.hf import write


@pytest.fixture
def folder(tmp_path):
    save_random("llama", tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def test_sharded_and_single_read_the_same(folder, tmp_path):
    save_random("llama", tmp_path / "single")
    sharded, single = Checkpoint.open(str(folder)), Checkpoint.open(str(tmp_path / "single"))
    assert len(set(sharded.shards.values())) > 2
    for layer in range(3):
        one, other = sharded.read_layer(layer), single.read_layer(layer)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_tied_weights_by_either_name(tmp_path):
    save_random("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding}, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), embedding)
    assert torch.equal(checkpoint.read("lm_head.weight"), embedding)


def test_single_file_beside_an_older_index(folder, tmp_path):
    """As transformers takes it."""
    save_random("llama", tmp_path / "newer", seed=1)
    shutil.copy(tmp_path / "newer" / "model.safetensors", folder)
    newer, both = (Checkpoint.open(str(path)) for path in (tmp_path / "newer", folder))
    assert both.weights_sha256 == newer.weights_sha256


def test_vocabulary_is_what_text_consists_of(folder):
    """Neither special tokens nor rows of the embedding that the tokenizer does not use; all rows without a tokenizer."""
    assert Checkpoint.open(str(folder)).vocabulary.tolist() == list(range(131))
    words = {f"w{index}": index for index in range(90)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.add_special_tokens(["<reserved>"])
    inner.add_tokens(["plain"])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w3", unk_token="w0").save_pretrained(folder)
    checkpoint = Checkpoint.open(str(folder))
    special = {checkpoint.tokenizer.convert_tokens_to_ids(token) for token in ("w0", "w3", "<reserved>")}
    assert len(special) == 3
    assert checkpoint.vocabulary.tolist() == [token for token in range(92) if token not in special]


def test_frequencies_that_old_checkpoints_store_are_left_out(tmp_path):
    """As Llama 2's do."""
    save_random("llama", tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.{}.self_attn.rotary_emb.inv_freq"
    tensors = load_file(path)
    save_file(tensors | {name.format(layer): torch.ones(4) for layer in range(3)}, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert set(checkpoint.shards) == set(tensors)
    assert Decoder(checkpoint, torch.device("cpu")).layer(2)
    (tmp_path / "hf").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "hf")
    assert not any("rotary" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))


def test_code_of_a_tokenizer_is_not_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "tok.py").write_text("open('ran', 'w')\nclass Tok: ...\n")
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        _ = Checkpoint.open(str(folder)).tokenizer
    assert not (folder / "ran").exists()


def test_weights_hash_follows_the_weights(folder, tmp_path):
    save_random("llama", tmp_path / "other", seed=1, max_shard_size="60KB")
    same = shutil.copytree(folder, tmp_path / "same")
    hashes = [Checkpoint.open(str(path)).weights_sha256 for path in (folder, same, tmp_path / "other")]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint.open(name)


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a local folder nor a model that can be fetched"):
        Checkpoint.open("nobody/nothing")


@pytest.mark.parametrize("error", [Exception("407 Proxy Authentication Required"), OSError("no route"), TimeoutError()])
def test_network_and_tokenizer_errors_of_any_kind(error, folder, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="neither a local folder nor a model that can be fetched") as caught:
        Checkpoint.open("nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        _ = Checkpoint.open(str(folder)).tokenizer


def test_what_is_downloaded(monkeypatch, folder):
    """Nothing that holds the same weights once more, no code, no pickles."""
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, **patterns: asked.update(patterns) or str(folder)
    )
    Checkpoint.open("some/model")
    names = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    names.append("additional_chat_templates/tool_use.jinja")
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "modeling.py", "model.bin"]
    assert list(filter_repo_objects(names + others, **asked)) == names


def test_tensors_that_the_configuration_does_not_know(folder):
    for layer in range(Checkpoint.open(str(folder)).config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        save_file(load_file(folder / shard) | {name.replace("weight", "bias"): torch.zeros(48)}, folder / shard)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        edit(folder / "model.safetensors.index.json", weight_map=index | {name.replace("weight", "bias"): shard})
    with pytest.raises(UserError, match=r"layer 0 of .* is not as config.json says: .*mlp.down_proj.bias") as caught:
        Decoder(Checkpoint.open(str(folder)), torch.device("cpu")).layer(0)
    assert "\n" not in str(caught.value)


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Checkpoint.open(f"~/{folder.name}").path == folder

"""Checkpoints that are damaged, hostile, or of another kind: one clear line each."""

import json

import pytest
import torch
from models import edit, save_random
from safetensors.torch import load_file, save_file

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError


@pytest.fixture
def folder(tmp_path):
    save_random("llama", tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def make_unknown(folder):
    edit(folder / "config.json", model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])


def make_remote(folder):
    edit(folder / "config.json", model_type="custom", auto_map={"AutoConfig": "configuration_custom.CustomConfig"})


def other_activation(folder):
    edit(folder / "config.json", hidden_act="gelu")


def truncate_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def escape_folder(folder):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.norm.weight": "../elsewhere.safetensors"})


def wrong_width(folder):
    edit(folder / "config.json", intermediate_size=81)


def other_vocabulary(folder):
    edit(folder / "config.json", vocab_size=7)


def one_layer_less(folder):
    edit(folder / "config.json", num_hidden_layers=1)


def no_object(folder):
    (folder / "config.json").write_text("null")


def impossible_heads(folder):
    edit(folder / "config.json", num_attention_heads=7)


def lose_a_tensor(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = folder / weight_map.pop(name)
    save_file({key: tensor for key, tensor in load_file(shard).items() if key != name}, shard)
    edit(index, weight_map=weight_map)


def lose_a_tensor_in_the_index(folder):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.layers.1.self_attn.v_proj.weight"]
    edit(index, weight_map=weight_map)


def change_tensor(folder, name, change):
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, shard)


def narrow_keys(folder):
    change_tensor(folder, "model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor[:-1])


def store_integers(folder):
    change_tensor(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.to(torch.int8))


def store_float8(folder):
    change_tensor(folder, "model.embed_tokens.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))


def routed_already(folder):
    edit(folder / "config.json", model_type="ir_llama", routing_threshold=0.5, auto_map={"AutoConfig": "a.B"})


def keep_the_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def add_an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def list_as_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def numbers_as_files(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def null_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')


def remove_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_head(folder):
    edit(folder / "config.json", tie_word_embeddings=False, architectures=["LlamaForSequenceClassification"])


def decoder_alone(folder):
    rename(folder, lambda name: name.removeprefix("model."))


def gptq_without_a_word(folder):
    rename(folder, lambda name: name.replace("q_proj.weight", "q_proj.qweight"))


def rename(folder, change):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {change(name): tensor for name, tensor in load_file(path).items()}
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def old_spelling_beside_code(folder):
    rope = {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}
    edit(
        folder / "config.json",
        model_type="phi3",
        rope_scaling=rope,
        auto_map={"AutoConfig": "a.B"},
        rope_parameters=rope,
    )


def more_keys(folder):
    edit(folder / "config.json", num_key_value_heads=3)


def padding_outside(folder):
    edit(folder / "config.json", pad_token_id=131)


def unnamed_method(folder):
    edit(folder / "config.json", quantization_config={"bits": 4, "group_size": 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_head, r"has no 'lm_head.weight', and config.json does not tie.*\(LlamaForSequenceClassification\)"),
        (decoder_alone, "holds a decoder without its head: save and convert the whole"),
        (gptq_without_a_word, "holds quantised weights"),
        (old_spelling_beside_code, "of type 'su', which is called 'longrope' today"),
        (padding_outside, "pad_token_id is 131, the vocabulary has 0 to 130: set it to null"),
        (unnamed_method, "weights quantised by an unnamed method are not read"),
        (remove_config, "has no config.json"),
        (break_config, "is not valid JSON"),
        (make_unknown, "family 'gpt_neox' is not known; known families: llama, mistral, qwen2, qwen3"),
        (make_remote, "needs code of its own"),
        (other_activation, "activation 'gelu'"),
        (truncate_shard, "is damaged.*download it again"),
        (remove_shard, "lacks the weight file"),
        (escape_folder, r"names a file outside its folder: '\.\./elsewhere"),
        (wrong_width, r"gate_proj.weight' is \[80, 48\]; config.json says \[81, 48\]"),
        (more_keys, r"layers.2.self_attn.k_proj.weight' is \[16, 48\]; config.json says \[24, 48\]"),
        (remove_weights, "has no 'model.safetensors'"),
        (other_vocabulary, r"embed_tokens.weight' is \[131, 48\]; config.json says \[7, 48\]"),
        (one_layer_less, r"has a tensor 'model.layers.[1-9].*config.json says that there are 1 layers"),
        (lose_a_tensor, r"lacks 'model.layers.0.mlp.up_proj.weight', which other layers have"),
        (lose_a_tensor_in_the_index, r"lacks 'model.layers.1.self_attn.v_proj.weight', which other layers have"),
        (narrow_keys, r"layers.1.self_attn.k_proj.weight' is \[\d+, 48\], 'model.layers.\d.self_attn.k_proj.weight' "),
        (store_integers, "layers.1.mlp.down_proj.weight' is I8, not floats: convert the model that it was made from"),
        (store_float8, "embed_tokens.weight' is F8_E4M3, not floats"),
        (routed_already, "was written by ir-convert: it is routed already; convert its base model"),
        (keep_the_adapter, "not a Hugging Face model folder, but an adapter: merge it into its base model"),
        (add_an_adapter, "holds an adapter beside its model: merge them"),
        (list_as_index, "index.json is damaged.*download it again"),
        (numbers_as_files, "index.json is damaged.*download it again"),
        (null_index, "index.json is damaged.*download it again"),
        (no_object, "config.json cannot be read"),
        (impossible_heads, "config.json cannot be read"),
    ],
)
def test_one_clear_line(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open(str(folder))
    assert "\n" not in str(caught.value)

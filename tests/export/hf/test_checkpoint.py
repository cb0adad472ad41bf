"""What is written into a checkpoint, and what becomes of it when it is loaded and saved again."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import EVERY
from routed_models import tokens, write_and_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.hf import load
from ir_convert.export.hf.card import model_card
from ir_convert.export.hf.writer import CODE
from ir_convert.routing import Routing
from ir_convert.units import Forecaster, Router


def test_files_and_names(exported):
    files = {path.name for path in exported.folder.iterdir()}
    assert {"config.json", "README.md", "routing.safetensors", "model.safetensors"} <= files
    assert {*CODE, "generation_config.json"} <= files
    assert not [name for name in files if name.startswith("part-")]
    written = load_file(exported.folder / "model.safetensors")
    base = {name: exported.checkpoint.read(name) for name in exported.checkpoint.shards}
    assert all(written[name].equal(tensor) for name, tensor in base.items())
    assert ("lm_head.weight" in written) is not exported.checkpoint.tied
    added = set(written) - set(base)
    assert len(added) == 3 * 2 * 8
    assert "model.layers.0.self_attn.forecaster.down.weight" in added
    assert Routing.load(exported.folder / "routing.safetensors").threshold == exported.routing.threshold


def test_configuration(exported):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (exported.folder / "config.json").read_text("utf-8")
    config = json.loads(text, parse_constant=refuse)
    assert config["model_type"] == f"ir_{exported.checkpoint.config.model_type}"
    assert config["dtype"] == "float32"
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    assert config.get("rope_local_base_freq") == rope.get("sliding_attention", {}).get("rope_theta")
    assert (config["forecaster_rank"], config["router_width"], config["kv_cache"]) == (5, 4, "full")
    assert config["routing_threshold"] == exported.routing.threshold
    assert str(exported.checkpoint.path) not in text + (exported.folder / "README.md").read_text("utf-8")


def test_shards(llama, tmp_path):
    base, checkpoint, routing = llama
    seen = []
    model = write_and_load(
        checkpoint, routing, tmp_path / "ir", shard_bytes=40_000, on_progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    index = json.loads((tmp_path / "ir" / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 3
    sizes = {shard: sum(t.nbytes for t in load_file(tmp_path / "ir" / shard).values()) for shard in shards}
    assert max(sizes.values()) <= 40_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    model.set_sparsity(0)
    assert_close(model(tokens(1, 9)).logits, base(tokens(1, 9)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(exported, tmp_path, dtype):
    model = write_and_load(exported.checkpoint, exported.routing, tmp_path / "ir", dtype=dtype)
    router = model.model.layers[1].mlp.router
    assert model.dtype == router.hidden.weight.dtype == dtype
    assert router.score.weight.dtype == torch.float32
    assert exported.routing.units[1, "mlp"].router.out.equal(router.score.weight)
    ids = torch.nn.functional.pad(tokens(2, 9), (3, 0))
    mask = (ids > 0).long()
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    assert 12 < model.generate(ids, attention_mask=mask, max_new_tokens=5).shape[1] <= 17
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").model.layers[1].mlp.router
    assert again.score.weight.equal(router.score.weight)


def test_the_precision_is_that_of_the_base_models_weights(llama, tmp_path):
    """What was calibrated stays in float32."""
    _, checkpoint, routing = llama
    file = checkpoint.path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    write_and_load(Checkpoint.open(str(checkpoint.path)), routing, tmp_path / "ir")
    written = load_file(tmp_path / "ir" / "model.safetensors")
    assert {written[name].dtype for name in checkpoint.shards} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in written.items() if name not in checkpoint.shards} == {torch.float32}
    assert json.loads((tmp_path / "ir" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_what_half_precision_cannot_hold_is_said(llama, tmp_path):
    _, checkpoint, routing = llama
    name = "model.layers.1.self_attn.q_proj.weight"
    rows, columns = checkpoint.read(name).shape
    huge = replace(routing, lora={name: (torch.full((1, columns), 1e4), torch.full((rows, 1), 1e4))})
    write_and_load(checkpoint, huge, tmp_path / "fine", dtype=torch.float32)
    with pytest.raises(UserError, match=f"'{name}' holds values that are not finite in float16: convert to float32"):
        write_and_load(checkpoint, huge, tmp_path / "ir", dtype=torch.float16)


@torch.no_grad()
def test_saved_again(exported, tmp_path):
    ids = tokens(2, 9)
    for sparsity in (0.2, 0):
        exported.model.set_sparsity(sparsity)
        exported.model.save_pretrained(tmp_path / str(sparsity))
        again = load(tmp_path / str(sparsity)).eval()
        assert again.config.sparsity == sparsity
        assert float(again.config.routing_threshold) == exported.routing.curve.at(sparsity)
        assert again(ids).logits.equal(exported.model(ids).logits)
        assert set(CODE) <= {path.name for path in (tmp_path / str(sparsity)).iterdir()}
        assert again.config.auto_map == {
            "AutoConfig": f"configuration_ir.{type(again.config).__name__}",
            "AutoModelForCausalLM": f"modeling_ir.{type(again).__name__}",
        }


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_sparsity_moves_along_the_curve(exported, share):
    curve = exported.routing.curve
    sparsity = share * curve.sparsity[-1]
    exported.model.set_sparsity(sparsity)
    assert float(exported.model.config.routing_threshold) == curve.at(sparsity)


def test_sparsity_out_of_reach(exported):
    before = exported.model.config.routing_threshold
    for sparsity in (-0.1, exported.routing.curve.sparsity[-1] + 0.01, 30, math.nan):
        with pytest.raises(ValueError, match="out of reach"):
            exported.model.set_sparsity(sparsity)
    assert exported.model.config.routing_threshold == before


def test_sparsity_as_an_argument_of_loading(exported):
    curve = exported.routing.curve
    sparsity = curve.sparsity[-1] / 3
    config = load(exported.folder, sparsity=sparsity).config
    assert (config.sparsity, config.routing_threshold) == (sparsity, curve.at(sparsity))
    config = load(exported.folder, routing_threshold=0.25).config
    assert config.routing_threshold == 0.25
    with pytest.raises(ValueError, match="out of reach"):
        load(exported.folder, sparsity=2)


@torch.no_grad()
def test_what_approximated_tokens_have_not_is_refused(exported):
    model, ids = exported.model, torch.arange(5, 25)[None]
    model.set_attn_implementation("eager")
    exported.set_threshold(-math.inf)
    assert len(model(ids, output_attentions=True).attentions) == len(model.model.layers)
    exported.set_threshold(0.0)
    with pytest.raises(ValueError, match="approximated tokens have no attention weights"):
        model(ids, output_attentions=True)
    if hasattr(model.config, "num_experts"):
        with pytest.raises(ValueError, match="approximated tokens have no scores"):
            model(ids, output_router_logits=True)


@torch.no_grad()
def test_every_unit_may_have_its_own_sizes(llama, tmp_path):
    _, checkpoint, routing = llama
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    for size, key in enumerate(routing.units):
        d = checkpoint.config.hidden_size
        routing.units[key].forecaster = Forecaster(normal(size, d), normal(size), normal(d, size), normal(d))
        routing.units[key].router = Router(normal(size + 2, d), normal(size + 2), normal(1, size + 2), normal(1))
    del routing.units[1, "attention"]
    model = write_and_load(checkpoint, routing, tmp_path / "ir")
    assert model.config.forecaster_rank == {"attention": [0, None, 4], "mlp": [1, 3, 5]}
    assert model.config.router_width == {"attention": [2, None, 6], "mlp": [3, 5, 7]}
    assert type(model.model.layers[1].self_attn) is LlamaAttention
    h = normal(2, 3, 48)
    for (layer, unit), routed in routing.units.items():
        module = getattr(model.model.layers[layer], {"attention": "self_attn", "mlp": "mlp"}[unit])
        assert_close(module.forecaster(h), routed.forecaster(h))
        assert_close(module.router(h), routed.router(h))
    assert model(tokens(1, 9)).logits.isfinite().all()


@torch.no_grad()
def test_tied_weights_under_either_name(llama, tmp_path):
    base, checkpoint, routing = llama
    weights = load_file(checkpoint.path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, checkpoint.path / "model.safetensors", metadata={"format": "pt"})
    model = write_and_load(Checkpoint.open(str(checkpoint.path)), routing, tmp_path / "ir")
    with safe_open(tmp_path / "ir" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()
        assert "lm_head.weight" not in file.keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.set_sparsity(0)
    assert_close(model(tokens(1, 9)).logits, base(tokens(1, 9)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_tokenizer(llama, tmp_path, named):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _, checkpoint, routing = llama
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(checkpoint.path)
    if not named:
        path = checkpoint.path / "tokenizer_config.json"
        values = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({k: v for k, v in values.items() if k != "tokenizer_class"}), "utf-8")
    write_and_load(checkpoint, routing, tmp_path / "ir")
    ids = AutoTokenizer.from_pretrained(tmp_path / "ir")("two one three")["input_ids"]
    assert ids == checkpoint.tokenizer("two one three")["input_ids"]
    assert ids[-3:] == [2, 1, 0]
    written = json.loads((tmp_path / "ir" / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] != "TokenizersBackend"


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type 'llama'"):
        load(tmp_path)


def test_every_family_is_exported():
    from ir_convert.export.hf.loader import MODELS
    from ir_convert.families import FAMILIES

    assert set(MODELS) == {f"ir_{family}" for family in FAMILIES}
    here = {name for name, family in FAMILIES.items() if family.transformers <= int(transformers.__version__[0])}
    assert {config.model_type for config in EVERY.values()} == here


@torch.no_grad()
def test_dropout_is_for_training(llama, tmp_path):
    _, checkpoint, routing = llama
    model, ids = write_and_load(checkpoint, routing, tmp_path / "ir"), tokens(1, 20)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert model(ids).logits.equal(model(ids).logits)
    model.train()
    assert not model(ids).logits.equal(model(ids).logits)


def test_sparsity_0_is_json(llama, tmp_path):
    _, checkpoint, routing = llama
    write_and_load(checkpoint, replace(routing, metadata=routing.metadata | {"sparsity": 0.0}), tmp_path / "ir")
    assert json.loads((tmp_path / "ir" / "config.json").read_text("utf-8"))["routing_threshold"] == "-inf"


def test_figures_on_the_card(llama):
    _, checkpoint, routing = llama
    figures = {"perplexity_dense": 11.0, "perplexity": 12.0, "kl": 0.25, "agreement": 0.75, "sparsity": 0.375}
    routing.metadata["test"] = figures | {"decisions": 0.5, "asked": 0.4}
    lines = model_card(checkpoint, routing).splitlines()
    for line in (
        "| on held-out text | dense | routed |",
        "| perplexity (per token) | 11.00 | 12.00 |",
        "| KL from dense (nats) | | 0.250 |",
        "| same most likely token | | 75.0% |",
        "| FLOPs saved | | 37.5% |",
        "| decisions approximated | | 50.0% |",
    ):
        assert line in lines
    routing.metadata["test"]["asked"] = 0.3
    assert "| on held-out text, set to 30.0% | dense | routed |" in model_card(checkpoint, routing).splitlines()

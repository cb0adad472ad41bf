"""Every recipe gives a routing that is written, read, and exported like any other."""

import math
from dataclasses import replace

import pytest
import torch
from calibrations import random_blocks, shorten
from models import save_random

from ir_convert.calibrate import Options, calibrate, recipes
from ir_convert.calibrate.endtoend.model import RoutedModel
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.errors import UserError
from ir_convert.evaluate import logits, measure
from ir_convert.export import hf
from ir_convert.flops import Budget
from ir_convert.routing import Routing
from ir_convert.stream import Team, Work

RECIPES = {
    "local": Options(),
    "polish": Options(polish=2),
    "paper": Options(recipe="paper", steps=3),
    "lora": Options(recipe="paper", steps=3, lora=True),
    "greedy": Options(recipe="greedy", steps=3),
    "polish-strict": Options(polish=2, kv_cache="strict"),
    "paper-mlp": Options(recipe="paper", steps=3, units=("mlp",)),
}


CASES = [(recipe, "llama") for recipe in RECIPES] + [
    *(
        ("local", family)
        for family in ("llama3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite", "qwen3_moe")
    ),
    *(("lora", family) for family in ("phi3", "qwen3_moe")),
    *(("polish-strict", family) for family in ("gemma2", "olmo2", "granite")),
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_recipe(name, family, tmp_path, monkeypatch):
    shorten(monkeypatch)
    save_random(family, tmp_path / "model")
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    options = replace(RECIPES[name], sparsity=0.2, rank=None if name == "greedy" else 3, router_width=4)
    made = calibrate(checkpoint, random_blocks(), options, work=Work(tmp_path / "work"))
    made.save(tmp_path / "r.safetensors")
    routing = Routing.load(tmp_path / "r.safetensors")
    layers = range(checkpoint.config.num_hidden_layers)
    assert list(routing.units) == [(layer, unit) for layer in layers for unit in options.units]
    assert routing.metadata["recipe"] == options.recipe
    assert routing.kv_cache == options.kv_cache
    ranks = {unit.forecaster.rank for unit in routing.units.values()}
    assert ranks == {0} if name == "greedy" else 0 not in ranks
    if name == "greedy":
        assert not any(unit.forecaster.bias.any() for unit in routing.units.values())
    assert bool(routing.lora) == (name == "lora")

    # The test figures are those of the model as it will be read.
    decoder = Decoder(checkpoint.with_lora(routing.lora), torch.device("cpu"))
    again = measure(decoder, routing.units, random_blocks().test, [routing.threshold], routing.kv_cache).quality(1)
    assert again.perplexity == pytest.approx(routing.metadata["test"]["perplexity"], rel=1e-5)
    assert again.sparsity == pytest.approx(routing.metadata["test"]["sparsity"], abs=1e-6)
    budget = Budget.of(checkpoint.config, routing.units, routing.kv_cache)
    assert routing.metadata["flops"]["overhead_share"] == pytest.approx(budget.overhead_share)

    folder = tmp_path / "hf"
    folder.mkdir()
    hf.write(checkpoint, routing, folder, torch.float32)
    card = (folder / "README.md").read_text("utf-8")
    assert f"| FLOPs saved | | {routing.metadata['test']['sparsity']:.1%} |" in card
    assert f"| decisions approximated | | {routing.metadata['test']['decisions']:.1%} |" in card
    kinds = " and ".join({"attention": "attention", "mlp": "MLP"}[unit] for unit in options.units)
    assert f"For every token, every {kinds} unit of this model" in card
    ids = random_blocks(seed=5).test
    with torch.no_grad():
        exported = hf.load(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    expected = logits(decoder, routing.units, ids, routing.threshold, routing.kv_cache)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["polish", "lora", "greedy"])
def test_gradient_checkpointing_changes_what_is_in_memory_alone(name, checkpoint, monkeypatch):
    shorten(monkeypatch)
    forward, sizes, made = RoutedModel.forward, [], []

    def watched(model, ids, *args):
        sizes[-1].append(len(ids))
        assert model.base.model.layers[0].gradient_checkpointing == (len(sizes) == 2)
        return forward(model, ids, *args)

    monkeypatch.setattr(RoutedModel, "forward", watched)
    for checkpointing in (False, True):
        sizes.append([])
        options = replace(
            RECIPES[name],
            sparsity=0.2,
            rank=None if name == "greedy" else 3,
            router_width=4,
            gradient_checkpointing=checkpointing,
        )
        made.append(calibrate(checkpoint, random_blocks(), options))
    assert [set(found) for found in sizes] == [{recipes.BATCH}, {1}]
    for key, unit in made[0].units.items():
        for part, tensor in unit.tensors().items():
            torch.testing.assert_close(tensor, made[1].units[key].tensors()[part], rtol=1e-3, atol=1e-3)
    assert made[0].metadata.keys() == made[1].metadata.keys()


@pytest.mark.parametrize("options", [Options(units=("attention",)), Options(units=("attention",), polish=2)])
def test_sparsity_0_where_there_is_little_to_save(options, checkpoint, monkeypatch):
    """Forecasts are fitted for another sparsity then, one that such a model reaches."""
    shorten(monkeypatch)
    options = replace(options, sparsity=0.0, rank=3, router_width=4)
    reachable = options.settled(checkpoint.config).budget(checkpoint.config).reachable
    assert 0 < reachable < 0.25
    routing = calibrate(checkpoint, random_blocks(), options)
    assert routing.threshold == -math.inf
    assert routing.curve.sparsity[-1] == pytest.approx(reachable, abs=1e-2)
    assert all(torch.isfinite(unit.forecaster.up).all() for unit in routing.units.values())


@pytest.mark.parametrize("rank", [18, 24, 36])
def test_a_small_sparsity_is_on_the_curve_whatever_the_rank(rank, checkpoint, monkeypatch):
    """Ranks beyond what forecasts can use are not handed out, and so cost less than the first threshold assumed."""
    shorten(monkeypatch)
    routing = calibrate(checkpoint, random_blocks(16, 8, 4), Options(rank=rank, router_width=1, sparsity=0.02))
    assert routing.curve.sparsity[0] < 0.02


@pytest.mark.parametrize("processes", range(1, 20))
def test_every_number_of_processes_shares_a_batch(processes):
    team = Team()
    team.size = processes
    batch = recipes._batch(team)
    assert batch % processes == 0
    assert 8 <= batch < 8 + processes


def test_lora_changes_the_dense_model(checkpoint, monkeypatch):
    shorten(monkeypatch)
    options = Options(recipe="paper", steps=3, lora=True, sparsity=0.2, rank=3, router_width=4)
    routing = calibrate(checkpoint, random_blocks(), options)
    name = next(iter(routing.lora))
    adapted = checkpoint.with_lora(routing.lora)
    assert not torch.equal(checkpoint.read(name), adapted.read(name))
    # What it is held against is the base model, not the adapted one.
    cpu, test = torch.device("cpu"), random_blocks().test
    base, other = (measure(Decoder(model, cpu), {}, test, []).quality(0).perplexity for model in (checkpoint, adapted))
    assert routing.metadata["test"]["perplexity_dense"] == pytest.approx(base, rel=1e-7) != other


def test_text_of_tokens_that_the_model_lacks(checkpoint):
    blocks = random_blocks()
    blocks.threshold[1, 5] = 131
    with pytest.raises(UserError, match="holds token 131, the model's embedding has 0 to 130"):
        calibrate(checkpoint, blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(recipe="magic"), "--recipe 'magic' is not known"),
        (Options(units=("mlp", "mlp")), "--units names no unit, or one twice"),
        (Options(units=()), "--units names no unit"),
        (Options(units=("norm",)), "--units 'norm' is not known"),
        (Options(lora=True), "--lora is the paper recipe's last stage"),
        (Options(kv_cache="half"), "--kv-cache 'half' is not known"),
        (Options(sparsity=1.0), "sparsity 1 is not in"),
        (Options(sparsity=0.75, units=("mlp",), rank=40), "out of reach"),
        (Options(rank=49), "rank 49 is more than the model's width"),
    ],
)
def test_options_that_cannot_be(options, message, checkpoint):
    with pytest.raises(UserError) as raised:
        calibrate(checkpoint, random_blocks(), options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)

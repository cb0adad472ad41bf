"""What the steps of a calibration are given, and what is said of what they gave."""

from dataclasses import replace

import pytest
import torch
from calibrations import random_blocks, shorten

from ir_convert.calibrate import Options, calibrate, endtoend, foreign, local, recipes
from ir_convert.decoder import Decoder
from ir_convert.evaluate import measure
from ir_convert.stream import routed


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)


def test_curve_and_figures_are_of_the_blocks_held_out_for_them(checkpoint):
    blocks = random_blocks()
    made, decoder = calibrate(checkpoint, blocks, Options(sparsity=0.3)), Decoder(checkpoint, torch.device("cpu"))
    measured = measure(decoder, made.units, blocks.threshold, made.curve.threshold)
    saved = [measured.quality(1 + place).sparsity for place in range(len(made.curve.threshold))]
    assert saved == pytest.approx(made.curve.sparsity, abs=1e-6)
    for index, name in enumerate(blocks.names):
        own = blocks.test[blocks.sources["test"] == index]
        measured, said = measure(decoder, made.units, own, [made.threshold]), made.metadata["test"]["sources"][name]
        assert said["perplexity_dense"] == pytest.approx(measured.quality(0).perplexity, rel=1e-5)
        assert said["perplexity"] == pytest.approx(measured.quality(1).perplexity, rel=1e-5)
        assert said["sparsity"] == pytest.approx(measured.quality(1).sparsity, abs=1e-6)


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_chunks_change_nothing(kv_cache, checkpoint, monkeypatch):
    """However many tokens are on the device at once."""
    options, made = Options(sparsity=0.3, rank=4, kv_cache=kv_cache), []
    for tokens in (routed.CHUNK_TOKENS, 3 * random_blocks().fit.shape[1]):
        monkeypatch.setattr(routed, "CHUNK_TOKENS", tokens)
        made.append(calibrate(checkpoint, random_blocks(), options))
    whole, parts = made
    assert parts.curve.sparsity == pytest.approx(whole.curve.sparsity, abs=5e-3)
    h = torch.randn(50, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for key, unit in whole.units.items():
        torch.testing.assert_close(parts.units[key].router(h), unit.router(h), atol=1e-2, rtol=0)
        torch.testing.assert_close(parts.units[key].forecaster(h), unit.forecaster(h), atol=1e-2, rtol=1e-2)


def test_ranks_are_as_they_were_allotted(checkpoint, monkeypatch):
    """And what is said of a unit is of its rank."""
    kept = []
    for name in ("run_backward", "allocate_ranks"):
        step = getattr(local, name)
        monkeypatch.setattr(local, name, lambda *given, step=step: kept.append(step(*given)) or kept[-1])
    made = calibrate(checkpoint, random_blocks(), Options(sparsity=0.3, rank=4))
    learnt, ranks = kept
    assert len(set(ranks.values())) > 1
    for entry in made.metadata["per_unit"]:
        key = entry["layer"], entry["unit"]
        assert made.units[key].forecaster.rank == entry["rank"] == ranks[key]
        assert entry["unexplained_variance"] == float(learnt[key].unexplained[ranks[key]])


@pytest.fixture
def stages(monkeypatch):
    """What every end-to-end stage was given: (its positional arguments, those by name)."""
    seen = []
    for name in ("train_paper", "train_lora", "train_polish"):
        stage = getattr(endtoend, name)
        monkeypatch.setattr(
            endtoend, name, lambda *args, stage=stage, **given: seen.append((args, given)) or stage(*args, **given)
        )
    return seen


@pytest.mark.parametrize(
    ("options", "count"),
    [(Options(polish=1), 1), (Options(recipe="paper", steps=1, lora=True), 2)],
    ids=["polish", "lora"],
)
def test_every_stage_trains_for_the_cache_that_will_be(options, count, checkpoint, stages):
    calibrate(checkpoint, random_blocks(), replace(options, kv_cache="strict", sparsity=0.2, rank=3, router_width=4))
    assert [given["kv_cache"] for _, given in stages] == ["strict"] * count


def test_polish_follows_the_dense_model_on_random_blocks_too(checkpoint, stages):
    blocks = random_blocks()
    calibrate(checkpoint, blocks, Options(polish=1, sparsity=0.3, rank=3, seed=5))
    (((_, _, ids), given),) = stages
    assert torch.equal(ids, endtoend.cut(foreign.with_foreign(blocks.fit, checkpoint.vocabulary, 5), recipes.LENGTH))
    assert not torch.equal(ids, endtoend.cut(blocks.fit, recipes.LENGTH))
    assert given["distil"]

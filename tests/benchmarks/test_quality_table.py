"""The quality table's machinery on a random model: its figures are what they claim to be, and it goes on where it stopped."""

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CONFIGS, save_random
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ir_convert.checkpoint import Checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BLOCK, ASKED = 64, 0.3


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(BENCHMARKS))
    import quality

    yield quality
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def table(quality, tmp_path_factory):
    """(transformers model, folder, result file, command that made it)"""
    folder = tmp_path_factory.mktemp("quality")
    model = save_random("llama", folder / "model")
    words = [f"w{number}" for number in range(CONFIGS["llama"].vocab_size)]
    words[:3] = ["<pad>", "<s>", "</s>"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder / "model")
    draw = random.Random(0)
    for name in ("calibration", "one", "other"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choices(words[3:], k=3000)))
    out = folder / "result.json"
    command = [str(folder / "model"), "--calibration", str(folder / "calibration.txt"), "--out", str(out)]
    command += ["--text", f"one={folder / 'one.txt'}", "--text", f"other={folder / 'other.txt'}"]
    command += ["--block", str(BLOCK), "--tokens", "3000", "--test-tokens", "1024", "--steps", "2", "--seeds", "0"]
    command += ["--sparsities", str(ASKED), "--methods", "dense,static,greedy,random"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "run_alone", quality.run_job)  # a process for each takes longer than the rest
        quality.main(command)
    return model, folder, out, command


def rows(out: Path, **wanted) -> dict:
    records = json.loads(out.read_text())["records"]
    return {(row["method"], row["source"]): row for row in records if all(row[name] == wanted[name] for name in wanted)}


def test_dense_perplexity_is_the_base_models(table, quality):
    model, folder, out, _ = table
    ids = quality.read_text(folder / "one.txt", Checkpoint.open(str(folder / "model")), 1024, BLOCK)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert rows(out, view="exact")["dense", "one"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_exact_budget_is_enclosed(table):
    exact = rows(table[2], view="exact", asked=ASKED)
    assert {method for method, _ in exact} == {"static", "greedy", "random"}
    for (_, source), row in exact.items():
        assert row["achieved"] == pytest.approx(ASKED, abs=1e-6)
        if source != "pooled":
            assert row["bracket_low"] <= ASKED <= row["bracket_high"]
    by_source = [math.log(exact["random", source]["perplexity"]) for source in ("one", "other", "pooled")]
    assert by_source[2] == pytest.approx(sum(by_source[:2]) / 2)


def test_random_routing_draws_every_unit_alike(table):
    deployed = rows(table[2], view="deployed", asked=ASKED)["random", "pooled"]
    assert deployed["achieved"] == pytest.approx(ASKED, abs=0.03)
    assert deployed["fit_seconds"] > 0


def test_goes_on_where_it_stopped(table, quality, monkeypatch, capsys):
    *_, out, command = table
    result = json.loads(out.read_text())
    result["records"] = [record for record in result["records"] if record["method"] != "dense"]
    out.write_text(json.dumps(result))
    ran = []
    monkeypatch.setattr(quality, "run_alone", lambda job: ran.append(job) or quality.run_job(job))
    quality.main(command)
    assert [job.methods for job in ran] == [("dense",)]
    assert "greedy, end to end" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another configuration"):
        quality.main([*command, "--steps", "3"])


def test_shared_passes_change_nothing(table, quality, monkeypatch):
    """Fits for two sparsities, and a polish that goes on from one, give what each gives by itself."""
    monkeypatch.setattr("ir_convert.calibrate.refit.ACTIVATION_STEPS", 5)
    monkeypatch.setattr("ir_convert.calibrate.router.STEPS", 5)
    *_, out, command = table
    jobs = []
    monkeypatch.setattr(quality, "run_alone", lambda job: jobs.append(job) or [])
    asked = ["--sparsities", "0.2,0.3", "--methods", "local,polish", "--polish", "2"]
    quality.main([*command, *asked, "--out", str(out.with_name("shared.json"))])
    (job,) = jobs
    together = quality.run_job(job)
    alone = quality.run_job(replace(job, sparsities=(0.3,)))
    figures = ("method", "source", "view", "perplexity", "kl", "achieved")

    def of(records):
        return [[row[name] for name in figures] for row in records if row["asked"] == 0.3]

    assert of(together) == of(alone)
    second = next(row for row in together if row["asked"] == 0.3)
    first = next(row for row in together if row["asked"] == 0.2)
    assert second["recipe_seconds"] > 0.5 * first["recipe_seconds"]


def test_nothing_is_recorded_twice(table, quality, monkeypatch, tmp_path):
    """A method and a sparsity that are added together: their job measures one row that is there already, too."""
    _, _, out, command = table
    shutil.copy(out, tmp_path / "result.json")
    command = [
        *command,
        "--sparsities",
        f"{ASKED},0.2",
        "--methods",
        "dense,random,local",
        "--out",
        str(tmp_path / "result.json"),
    ]

    def measured(job):
        return [
            {"method": method, "asked": asked, "seed": job.seed} for method in job.methods for asked in job.sparsities
        ]

    monkeypatch.setattr(quality, "run_alone", measured)
    monkeypatch.setattr(quality, "print_all", lambda _: None)
    before = json.loads(out.read_text())["records"]
    quality.main(command)
    added = json.loads((tmp_path / "result.json").read_text())["records"][len(before) :]
    found = [(row["method"], row["asked"], row["seed"]) for row in added]
    assert sorted(found) == [("local", 0.2, 0), ("local", ASKED, 0), ("random", 0.2, 0)]


@pytest.mark.usefixtures("quality")
def test_interpolation():
    from quality_measure import OutOfReachError, interpolate, seek

    measured = [{"achieved": s, "log_perplexity": 2 * s, "threshold": 10 * s} for s in (0.2, 0.38, 0.42, 0.6)]
    row = interpolate(measured, 0.4)
    assert row["log_perplexity"] == pytest.approx(0.8)
    assert (row["bracket_low"], row["bracket_high"]) == (0.38, 0.42)
    with pytest.raises(OutOfReachError):
        interpolate(measured, 0.7)
    threshold, slope = seek(lambda ts: [1 / (1 + math.exp(-t)) for t in ts], 0.7, start=-3.0, spread=0.2)
    assert threshold == pytest.approx(math.log(0.7 / 0.3), abs=0.01)
    assert slope == pytest.approx(1 / 0.21, rel=0.1)

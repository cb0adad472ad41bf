"""A calibration that is stopped anywhere, and started again, gives what it would have given."""

import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from calibrate_worker import Killed, dawdle, start
from calibrations import assert_same, random_blocks, shorten
from models import save_random

from ir_convert.calibrate import Options, calibrate, foreign
from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.stream import Work

VARIANTS = {
    "default": Options(sparsity=0.3),
    "strict": Options(sparsity=0.4, kv_cache="strict", seed=3),
    "mlp": Options(sparsity=0.2, units=("mlp",), rank=3),
    "skipping": Options(sparsity=0.3, rank=0),
}


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


def run_to_the_end(checkpoint, options, folder, monkeypatch, dies_before: int | None, dies_after: int | None):
    """Kills every run at its n-th save and starts another on the same folder; returns the routing, and the saves by run."""
    save, runs = Work.save, []

    def dying_save(work, step, result):
        if len(runs[-1]) + 1 == dies_before:
            raise Killed
        save(work, step, result)
        runs[-1].append(step)
        if len(runs[-1]) == dies_after:
            raise Killed

    monkeypatch.setattr(Work, "save", dying_save)
    while True:
        runs.append([])
        assert len(runs) < 50
        try:
            return calibrate(checkpoint, random_blocks(), options, work=Work(folder)), runs
        except Killed:
            continue


@pytest.mark.parametrize("variant", VARIANTS)
def test_disk_and_memory_are_the_same(variant, checkpoint, short, tmp_path, monkeypatch):
    one = calibrate(checkpoint, random_blocks(), VARIANTS[variant])
    other = calibrate(checkpoint, random_blocks(), VARIANTS[variant], work=Work(tmp_path))
    assert_same(one, other)
    monkeypatch.setattr(Work, "save", lambda *step: pytest.fail(f"done again: {step}"))
    assert_same(one, calibrate(checkpoint, random_blocks(), VARIANTS[variant], work=Work(tmp_path)))


@pytest.mark.parametrize("variant", ["default", "strict"])
@pytest.mark.parametrize(("before", "after"), [(None, 1), (2, None)], ids=["after saving", "before saving"])
def test_killed_at_every_step(variant, before, after, checkpoint, short, tmp_path, monkeypatch):
    """Each run does one more step, and dies when it is saved, or when the next one is done but not saved."""
    options = VARIANTS[variant]
    unbroken = calibrate(checkpoint, random_blocks(), options)
    routing, runs = run_to_the_end(checkpoint, options, tmp_path, monkeypatch, before, after)
    assert_same(routing, unbroken)
    steps = [step for run in runs for step in run]
    assert len(set(steps)) == len(steps)  # no step is done twice
    assert set(steps) == {path.stem for path in tmp_path.glob("*.safetensors")}
    assert all(len(run) <= 1 for run in runs)
    stages = ("forward", "backward", "refit", "threshold.near.0", "threshold.curve", "evaluation")
    assert set(steps) > {f"{stage}.{layer}" for stage in stages for layer in range(3)}


@pytest.mark.parametrize(
    ("name", "least"), [("forward.2.states", 1), ("backward.1.safetensors", 5), ("refit.0.safetensors", 8)]
)
def test_kill_minus_nine(name, least, checkpoint, short, tmp_path):
    """A process that is killed at a random moment after a file appears, whatever it is doing then."""
    process = start(dawdle, str(checkpoint.path), tmp_path, VARIANTS["default"])
    while process.is_alive() and not (tmp_path / name).exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "evaluated.safetensors").exists()
    work = Work(tmp_path)
    resumed = calibrate(checkpoint, random_blocks(), VARIANTS["default"], work=work)
    assert work.resumed >= least
    assert_same(resumed, calibrate(checkpoint, random_blocks(), VARIANTS["default"]))


@pytest.mark.parametrize(
    ("tensor", "unit"),
    [
        ("self_attn.q_proj", "attention"),
        ("self_attn.v_proj", "attention"),
        ("self_attn.o_proj", "attention"),
        ("mlp.up_proj", "mlp"),
        ("mlp.down_proj", "mlp"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(tensor, unit, value, tmp_path, short):
    model = save_random("llama", tmp_path)
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{tensor}.weight")[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"layer 1, {unit}: NaN or infinity in the hidden states.* block 0: .*damaged"):
        calibrate(Checkpoint.open(str(tmp_path)), random_blocks())


def test_the_first_broken_block_is_named(tmp_path, short, monkeypatch):
    """A damaged embedding shows where its token first stands."""
    monkeypatch.setattr(foreign, "EVERY", 0)
    model, blocks = save_random("llama-bias", tmp_path), random_blocks()
    blocks.fit[:] = blocks.fit.clamp(min=4)
    blocks.fit[5:, 7] = 3
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layer 0, attention: .* block 5:"):
        calibrate(Checkpoint.open(str(tmp_path)), blocks)


def test_a_broken_head_is_found(tmp_path, short):
    model = save_random("llama-bias", tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="NaN or infinity in the gradients"):
        calibrate(Checkpoint.open(str(tmp_path)), random_blocks())


@pytest.mark.parametrize(
    "options",
    [Options(polish=2), Options(recipe="paper", steps=3, polish=2), Options(recipe="paper", steps=3, lora=True)],
    ids=["polish", "paper-polish", "lora"],
)
def test_end_to_end_on_disk_and_in_memory_are_the_same(options, checkpoint, short, tmp_path):
    """No step takes another's result for its own."""
    options = replace(options, sparsity=0.2, rank=3)
    one = calibrate(checkpoint, random_blocks(), options)
    assert_same(one, calibrate(checkpoint, random_blocks(), options, work=Work(tmp_path)))

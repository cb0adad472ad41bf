"""The sparsity is held where it was asked for, on text that the calibration did not foresee."""

import gc
import math
import weakref

import pytest
import torch
from models import random_routing, save_random
from routed_models import tokens, write_and_load

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write
from ir_convert.export.hf.control_ir import SparsityControl
from ir_convert.routing import Curve

# Random scores straddle 0, which saves about 0.4; this curve is off by 2.
OFF = Curve([0.2, 0.4, 0.6], [-3.0, -2.0, -1.0])


@pytest.fixture(scope="module", params=["full", "strict"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_random("llama", path)
    checkpoint = Checkpoint.open(str(path))
    routing = random_routing(checkpoint, kv_cache=request.param)
    routing.curve = OFF
    return write_and_load(checkpoint, routing, tmp_path_factory.mktemp("made") / "ir")


def run(model, block: torch.Tensor) -> float:
    """Returns what was saved."""
    with model.routing_statistics() as seen, torch.no_grad():
        model(block)
    return seen.sparsity


def test_a_curve_that_is_off(model):
    before = model.config.routing_threshold
    with model.hold_sparsity(0.4) as control:
        assert model.config.routing_threshold == -2.0
        saved = [run(model, tokens(1, 256, seed=seed)) for seed in range(30)]
        assert control.threshold > -1.0
        run(model, tokens(1, 1))
        assert model.config.routing_threshold == control.threshold
    assert saved[0] < 0.3
    assert abs(sum(saved[-10:]) / 10 - 0.4) < 0.02
    assert model.config.routing_threshold == before
    assert run(model, tokens(1, 256)) == saved[0]  # nothing moves it any more
    assert run(model, tokens(1, 256)) == saved[0]


def test_single_tokens_move_it_once_in_a_window(model):
    with model.hold_sparsity(0.4), torch.no_grad():
        ids, thresholds = tokens(1, 1), []
        for _ in range(256):
            thresholds.append(model.config.routing_threshold)
            model(ids)
        assert set(thresholds) == {-2.0}
        model(ids)
        assert model.config.routing_threshold != -2.0


def test_dense_stays_dense(model):
    with model.hold_sparsity(0):
        for seed in range(3):
            assert run(model, tokens(1, 256, seed=seed)) == 0
            assert model.config.routing_threshold == "-inf"  # not a number, for JSON has no infinity


@pytest.mark.parametrize(("sparsity", "gain", "message"), [(0.61, 2.0, "out of reach"), (0.4, math.nan, "gain nan")])
def test_what_cannot_be_held_changes_nothing(model, sparsity, gain, message):
    before = model.config.routing_threshold
    with pytest.raises(ValueError, match=message), model.hold_sparsity(sparsity, gain):
        pass
    assert model.config.routing_threshold == before


@torch.no_grad()
def test_the_innermost_is_in_charge(model):
    with model.hold_sparsity(0.4) as outer:
        model(tokens(1, 300))
        held = outer.threshold
        with model.hold_sparsity(0.2):
            for seed in range(4):
                model(tokens(1, 300, seed=seed))
        assert outer.threshold == held
        assert run(model, tokens(1, 300)) > 0.1
        assert model.config.routing_threshold == held


@torch.no_grad()
def test_blocks_that_do_not_end_in_the_order_they_began(model):
    """As those of two threads, each of which answers a request."""
    before = model.config.sparsity, model.config.routing_threshold
    first, second = model.hold_sparsity(0.4), model.hold_sparsity(0.2)
    first.__enter__()
    control = second.__enter__()
    first.__exit__(None, None, None)
    for seed in range(3):
        model(tokens(1, 300, seed=seed))
    assert control.sparsity == 0.2
    second.__exit__(None, None, None)
    assert (model.config.sparsity, model.config.routing_threshold) == before


@torch.no_grad()
def test_a_dial_that_is_moved_inside(model):
    with model.hold_sparsity(0.4) as control:
        model.set_sparsity(0)
        assert [run(model, tokens(1, 300, seed=seed)) for seed in range(3)] == [0, 0, 0]
        assert control.sparsity == 0
        model.set_sparsity(0.2)
        saved = [run(model, tokens(1, 256, seed=seed)) for seed in range(20)]
    assert abs(sum(saved[-8:]) / 8 - 0.2) < 0.03


@torch.no_grad()
def test_a_call_that_fails_counts_nothing(model):
    def fail(*_):
        raise MemoryError

    block = tokens(1, 300)
    with model.hold_sparsity(0.4) as control:
        model(block)
        moved = control.threshold
    with model.hold_sparsity(0.4) as control:
        hook = model.model.layers[1].register_forward_hook(fail)
        for _ in range(3):
            with pytest.raises(MemoryError):
                model(block)
        hook.remove()
        model(block)
        assert control.threshold == moved


@torch.no_grad()
def test_padding_counts_nowhere(model):
    lengths = (256, 64, 40, 9)
    ids, mask = tokens(4, 256), torch.zeros(4, 256, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 256 - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [row[None, 256 - length :] for row, length in zip(ids, lengths, strict=True)]
    alone = sum(run(model, row) * row.numel() for row in rows) / sum(lengths)
    with model.routing_statistics() as seen:
        model(ids, attention_mask=mask, position_ids=positions)
    assert seen.tokens == sum(lengths)
    assert seen.sparsity == pytest.approx(alone, abs=1e-6)
    with model.hold_sparsity(0.4) as control:
        model(ids, attention_mask=mask, position_ids=positions)
    assert control.threshold == pytest.approx(-2.0 + 2.0 * (0.4 - alone), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["ids", "embeddings", "positional"])
def test_padding_counts_nowhere_however_it_is_handed_over(model, how):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with model.routing_statistics() as seen:
        if how == "ids":
            model(ids, attention_mask=mask)
        elif how == "embeddings":
            model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
        else:
            model.model(ids, mask)
    assert seen.tokens == 7 + 12


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_padding_in_a_cache(model, chunked):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"prefill_chunk_size": 4} if chunked else {}
    with model.routing_statistics() as seen:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)
    assert seen.tokens == 7 + 12 + 2 * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_two_padded_calls(model, reentrant):
    """As in a loss of chosen and rejected texts: both are computed again when both have run."""
    ids, gradients = tokens(2, 40), []
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[0][0, :11] = masks[1][1, :23] = 0
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            with model.routing_statistics():
                sum(model(ids, attention_mask=mask, labels=ids).loss for mask in masks).backward()
            gradients.append(model.model.layers[0].mlp.forecaster.up.weight.grad.clone())
        finally:
            model.gradient_checkpointing_disable()
            model.eval().zero_grad()
    torch.testing.assert_close(*gradients)


def test_a_model_that_nobody_holds_is_gone(tmp_path):
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path)
    gc.disable()
    try:
        model = load(tmp_path)
        with model.hold_sparsity(0.2), torch.no_grad():
            model(tokens(1, 5))
        there = weakref.ref(model)
        del model
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_decides_alike(model, reentrant):
    block, gradients = tokens(1, 300), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            with model.hold_sparsity(0.4) as control:
                for _ in range(2):
                    model.zero_grad()
                    model(block, labels=block).loss.backward()
                gradients.append((control.threshold, model.model.layers[0].mlp.forecaster.up.weight.grad.clone()))
        finally:
            model.gradient_checkpointing_disable()
            model.eval().zero_grad()
    assert gradients[0][0] == gradients[1][0]
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


@torch.no_grad()
def test_wrappers_that_pass_the_outer_module_by(model):
    with model.hold_sparsity(0.4) as control:
        model.forward(tokens(1, 300))
        assert control.threshold != -2.0


def test_law():
    """threshold += gain * (asked - saved), saved being the mean over the tokens of a window."""
    control = SparsityControl(0.5, 1.0, gain=4.0)
    assert control.observe(0.0, 100) == 1.0
    assert control.observe(0.9, 155) == 1.0
    assert control.observe(0.5, 1) == pytest.approx(1 + 4 * (0.5 - (0.9 * 155 + 0.5) / 256))
    start = control.threshold
    assert control.observe(0.75, 1000) == start - 1
    assert control.observe(0.25, 256) == start
    assert SparsityControl(0.0, -math.inf).observe(-0.1, 512) == -math.inf


def test_gain(model):
    with model.hold_sparsity(0.4, gain=0.5) as control:
        saved = run(model, tokens(1, 300))
    assert control.threshold == pytest.approx(-2.0 + 0.5 * (0.4 - saved), abs=1e-6)


def test_nothing_stays_behind(model):
    hooks = model.model._forward_pre_hooks, model.model._forward_hooks
    before = [len(held) for held in hooks]
    with model.hold_sparsity(0.2), model.routing_statistics():
        pass
    with pytest.raises(KeyError), model.routing_statistics():
        raise KeyError
    assert [len(held) for held in hooks] == before
    assert not any(module.counts for module in model.modules() if hasattr(module, "counts"))


@torch.no_grad()
def test_what_was_held_is_not_what_is_saved(model):
    before = model.config.sparsity, model.config.routing_threshold
    with model.hold_sparsity(0.2):
        model(tokens(1, 300))
    assert (model.config.sparsity, model.config.routing_threshold) == before

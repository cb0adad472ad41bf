"""The routed model computes what a model that computes everything and then chooses would."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import watch
from routed_models import Exported, tokens
from torch.testing import assert_close

from ir_convert.families import UNITS
from ir_convert.flops import Budget, forecaster_flops

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def padded(lengths: list[int], side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of rows of these lengths: ids, mask, positions."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = side == "left"
        mask[row, :length] |= side == "right"
    return {
        "input_ids": tokens(len(lengths), longest, seed=seed) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def threshold_for(exported: Exported, batch: dict[str, torch.Tensor], executed: int) -> float:
    """The threshold at which the first attention unit executes this many of the batch's tokens."""
    exported.reference(**batch)
    scores = exported.units()[0, "attention"].scores.flatten().sort(descending=True).values
    if executed == 0:
        return math.inf
    return -math.inf if executed >= len(scores) else float(scores[executed - 1 : executed + 1].mean())


@torch.no_grad()
def test_dense_is_the_base_model(exported):
    exported.model.set_sparsity(0)
    for batch in (padded([17], "left"), padded([9, 3, 12], "left"), padded([9, 3, 12], "right")):
        real = batch["attention_mask"].bool()
        assert_close(exported.model(**batch).logits[real], exported.base(**batch).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    share=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_routed_is_the_reference(exported, attention, lengths, side, share, seed):
    if attention not in exported.kernels:
        pytest.skip("this model has a soft cap, which sdpa has not")
    exported.model.set_attn_implementation(attention)
    batch = padded(lengths, side, seed)
    exported.set_threshold(threshold_for(exported, batch, math.ceil(share * batch["input_ids"].numel())))
    logits = exported.model(**batch).logits
    assert logits.isfinite().all()
    real = batch["attention_mask"].bool()
    assert_close(logits[real], exported.reference(**batch).logits[real], **CLOSE)


@pytest.mark.parametrize("executed", [0, 1, 20])
@torch.no_grad()
def test_none_one_all(exported, executed):
    # Distinct tokens: equal ones have equal scores in the first layer.
    batch = {"input_ids": 3 + torch.randperm(128, generator=torch.Generator().manual_seed(0))[:20].view(2, 10)}
    exported.set_threshold(threshold_for(exported, batch, executed))
    with exported.model.routing_statistics() as seen:
        logits = exported.model(**batch).logits
    assert seen.counts[0, "attention"].executed == executed
    assert_close(logits, exported.reference(**batch).logits, **CLOSE)


@torch.no_grad()
def test_a_mask_of_the_user(exported):
    """A four-dimensional mask, one per row and another per head."""
    allowed = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 6, 10, 10).clone()
    allowed[1, 3, 5:, 2:4] = False
    ids = tokens(2, 10)
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (additive, additive[:, :1]):
        exported.set_threshold(exported.routing.threshold)
        expected = exported.reference(ids, attention_mask=mask).logits
        assert_close(exported.model(ids, attention_mask=mask).logits, expected, **CLOSE)


@torch.no_grad()
def test_skipped_work_is_not_done(exported):
    """FLOPs of each unit: K and V and the routing for all tokens, the rest for executed ones; against a dense run's.

    Padding counts nowhere, but is computed.
    """
    units = {
        (index, unit): getattr(layer, exported.checkpoint.family.unit(unit).module)
        for index, layer in enumerate(exported.model.model.layers)
        for unit in UNITS
    }
    batch = padded([11, 4, 7], "left")
    real = batch["attention_mask"].bool()
    budget = Budget.of(exported.checkpoint.config, exported.routing.units)
    with exported.model.routing_statistics() as seen, watch(exported.model, units) as routed:
        exported.model(**batch)
    exported.reference(**batch)
    exported.model.set_sparsity(0)
    with watch(exported.model, units) as dense:
        exported.model(**batch)
    assert routed.flops[None] == dense.flops[None]
    for key, reference in exported.units().items():
        execute, count = reference.scores > reference.threshold, seen.counts[key]
        executed, overhead = int(execute.sum()), budget.overhead[key]
        assert (count.executed, count.tokens, count.routed) == (int((execute & real).sum()), 22, 22)
        if executed == 33:  # then there is nothing to forecast
            overhead -= forecaster_flops(
                exported.checkpoint.config.hidden_size, exported.routing.units[key].forecaster.rank
            )
        assert routed.flops[key] == dense.flops[key] - (33 - executed) * budget.saved[key[1]] + 33 * overhead
    assert any(0 < count.executed < count.tokens for count in seen.counts.values())


@torch.no_grad()
def test_statistics_agree_with_the_budget(exported):
    ids = tokens(2, 13)
    with exported.model.routing_statistics() as seen:
        exported.model(ids[:, :5])
        exported.model(ids)
    budget = Budget.of(exported.checkpoint.config, exported.routing.units)
    rates = {key: 1 - count.executed / count.tokens for key, count in seen.counts.items()}
    assert set(rates) == {(layer, unit) for layer in range(3) for unit in UNITS}
    assert seen.sparsity == pytest.approx(budget.sparsity(rates))
    assert seen.decisions == pytest.approx(budget.decisions(rates))

    exported.model.set_sparsity(0)
    with exported.model.routing_statistics() as seen:
        assert (seen.sparsity, seen.decisions) == (0, 0)
        exported.model(ids)
    assert (seen.sparsity, seen.decisions) == (0, 0)
    assert not any(layer.mlp.counts for layer in exported.model.model.layers)


def test_gradients_are_finite_and_reach_forecasters(exported):
    batch = padded([9, 4], "left")
    exported.model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in exported.model.named_parameters() if p.grad is not None}
    exported.model.zero_grad(set_to_none=True)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for unit in ("self_attn", "mlp"):  # in some layer: a random router may execute all tokens of another
        assert any(g.abs().sum() > 0 for name, g in gradients.items() if f"{unit}.forecaster.down.weight" in name)


@torch.no_grad()
def test_under_autocast(exported, monkeypatch):
    batch = padded([9, 4], "left")
    with torch.autocast("cpu", torch.bfloat16):
        assert exported.model(**batch).logits.isfinite().all()
    # Where no rounding can turn a decision.
    for threshold in (-math.inf, math.inf):
        monkeypatch.setattr(exported.model.config, "routing_threshold", threshold)
        real, exact = batch["attention_mask"].bool(), exported.model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = exported.model(**batch).logits
        assert (rounded - exact)[real].norm() < 0.05 * exact[real].norm()


def test_other_attention_kernels_are_refused(exported):
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            type(exported.model)._from_config(exported.model.config, attn_implementation=name)

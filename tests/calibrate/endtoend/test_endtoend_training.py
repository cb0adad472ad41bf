"""The end-to-end stages on random models: what they move, what they leave alone, and what they say when they fail."""

import dataclasses

import pytest
import torch
from models import random_routing, save_random

from ir_convert.calibrate.endtoend.gates import Gates
from ir_convert.calibrate.endtoend.lora import Adapters, train_lora
from ir_convert.calibrate.endtoend.model import RoutedModel
from ir_convert.calibrate.endtoend.objective import prediction_loss, share_saved
from ir_convert.calibrate.endtoend.paper import train_paper, uniform_shapes
from ir_convert.calibrate.endtoend.polish import train_polish
from ir_convert.calibrate.endtoend.train import Descent, batches, cut
from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.flops import Budget

THRESHOLD = 0.3
SHORT = Descent(steps=4, batch=2, lr=3e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(checkpoint, random units, token blocks)."""
    path = tmp_path_factory.mktemp("llama")
    save_random("llama", path)
    checkpoint = Checkpoint.open(str(path))
    ids = torch.randint(3, checkpoint.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(5))
    return checkpoint, random_routing(checkpoint).units, ids


def equal(units, others, part=""):
    return units.keys() == others.keys() and all(
        torch.equal(tensor, others[key].tensors()[name])
        for key, routed in units.items()
        for name, tensor in routed.tensors().items()
        if name.startswith(part)
    )


def saved(checkpoint, units, ids, threshold):
    with torch.no_grad():
        gates = RoutedModel(checkpoint, units)(ids, Gates("hard", threshold)).gates
    return float(share_saved(gates, Budget.of(checkpoint.config, units)))


def test_batches_draw_every_block_before_any_comes_again():
    rows = batches(5, Descent(steps=4, batch=3, lr=0.1), torch.Generator().manual_seed(0)).flatten().tolist()
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5))
    assert cut(torch.arange(14).view(2, 7), 3).tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert cut(torch.arange(14).view(2, 7), 6).tolist() == [[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]
    begun = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6]])
    assert cut(begun, 3).tolist() == [[1, 5, 6], [1, 7, 8], [1, 2, 3], [1, 4, 5]]
    assert cut(cut(begun, 5), 3).tolist() == cut(begun, 3).tolist()
    assert cut(begun[:1], 3).tolist() == [[1, 5, 6], [7, 8, 9]]  # of one block nobody can tell


def test_paper_recipe_learns_forecasts_and_is_reproducible(small):
    checkpoint, _, ids = small
    shapes = uniform_shapes(checkpoint.config, rank=6, width=4)
    runs = []
    for seed in (0, 0, 1):
        units, traces = train_paper(
            checkpoint, ids, shapes, sparsity=0.3, seed=seed,
            forecasters=Descent(steps=30, batch=4, lr=2e-2, length=8), routers=SHORT,
        )  # fmt: skip
        runs.append(units)
        assert [trace.stage for trace in traces] == ["forecasters", "routers"]
        assert traces[0].loss[-1] < 0.9 * traces[0].loss[0]
        assert [len(trace.loss) for trace in traces] == [30, 4]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_greedy_starts_at_execute_and_has_no_forecast(small):
    checkpoint, _, ids = small
    shapes = uniform_shapes(checkpoint.config, rank=6, width=4)
    units, traces = train_paper(checkpoint, ids, shapes, sparsity=0.3, greedy=True, routers=SHORT)
    assert len(traces) == 1
    assert traces[0].saved[0] < 0.15
    for routed in units.values():
        assert routed.forecaster.rank == 0
        assert not routed.forecaster.bias.any()


@pytest.mark.parametrize("asked", [0.1, 0.5])
def test_penalty_moves_the_saved_share_to_the_asked_one(small, asked):
    checkpoint, units, ids = small
    before = saved(checkpoint, units, ids, THRESHOLD)
    descent = Descent(steps=25, batch=8, lr=2e-2)
    moved, trace = train_polish(
        checkpoint, units, ids, threshold=THRESHOLD, sparsity=asked, descent=descent, penalty=100.0
    )
    assert trace.saved[0] == pytest.approx(before, abs=1e-5)
    assert abs(saved(checkpoint, moved, ids, THRESHOLD) - asked) < 0.5 * abs(before - asked)


def test_polish_trains_routers_alone_unless_asked(small):
    checkpoint, units, ids = small
    original = {key: dataclasses.replace(routed) for key, routed in units.items()}
    options = {"threshold": THRESHOLD, "sparsity": 0.3, "descent": SHORT}
    alone, _ = train_polish(checkpoint, units, ids, **options)
    both, _ = train_polish(checkpoint, units, ids, forecaster_lr=1e-3, **options)
    assert equal(alone, units, "forecaster")
    assert not equal(alone, units, "router")
    assert not equal(both, units, "forecaster")
    assert equal(units, original)
    assert equal(alone, train_polish(checkpoint, units, ids, **options)[0])


def test_polish_at_rate_zero_changes_nothing_averaged_or_not(small):
    checkpoint, units, ids = small
    for average in (False, True):
        still = Descent(steps=3, batch=2, lr=0.0, average=average, weight_decay=0.1)
        assert equal(train_polish(checkpoint, units, ids, threshold=THRESHOLD, sparsity=0.3, descent=still)[0], units)


def test_mlp_only_routes_nothing_else(small):
    checkpoint, _, ids = small
    shapes = uniform_shapes(checkpoint.config, rank=3, width=2, units=("mlp",))
    units, _ = train_paper(checkpoint, ids, shapes, sparsity=0.3, forecasters=SHORT, routers=SHORT)
    assert {unit for _, unit in units} == {"mlp"}
    polished, _ = train_polish(checkpoint, units, ids, threshold=0.0, sparsity=0.3, descent=SHORT)
    assert polished.keys() == units.keys()


@pytest.mark.parametrize("beyond", [-1e-3, 1e-3])
def test_micro_batches_give_the_whole_batchs_step(small, beyond):
    """Also where the batch saves about what is asked: some of its blocks save more then, some less."""
    checkpoint, units, ids = small

    def polish(sparsity: float, steps: int, micro_batch: int | None):
        descent = Descent(steps, batch=4, lr=1e-3, micro_batch=micro_batch)
        return train_polish(checkpoint, units, ids, threshold=THRESHOLD, sparsity=sparsity, descent=descent)

    asked = polish(0.3, 1, None)[1].saved[0] + beyond
    (whole, one), (parts, other) = (polish(asked, 2, micro_batch) for micro_batch in (None, 1))
    assert other.loss == pytest.approx(one.loss, abs=1e-5)
    assert other.saved == pytest.approx(one.saved, abs=1e-6)
    for key, routed in whole.items():
        for name, tensor in routed.tensors().items():
            torch.testing.assert_close(tensor, parts[key].tensors()[name], atol=1e-4, rtol=1e-4)


def test_distilled_loss_is_zero_at_the_dense_model(small):
    checkpoint, units, ids = small
    _, trace = train_polish(checkpoint, units, ids, threshold=-1e9, sparsity=0.3, descent=SHORT, distil=True)
    assert trace.language[0] == pytest.approx(0, abs=1e-5)


def test_folded_lora_is_the_lora_that_was_applied(small):
    checkpoint, units, ids = small
    lora, trace = train_lora(checkpoint, units, ids, threshold=THRESHOLD, rank=3, descent=Descent(12, 8, 1e-2))
    assert trace.loss[-1] < trace.loss[0]
    assert len(lora) == 3 * checkpoint.config.num_hidden_layers
    assert lora.keys() <= checkpoint.shards.keys()
    a, b = lora["model.layers.1.mlp.gate_proj.weight"]
    assert (a.shape, b.shape) == ((3, 48), (80, 3))
    adapters = Adapters(checkpoint, ("q_proj", "v_proj", "gate_proj"), 3, 6.0, 0)
    applied = RoutedModel(checkpoint, units, adapt=adapters.adapt)
    with torch.no_grad():
        for name, module in adapters.modules.items():
            module.a.copy_(lora[name][0])
            module.b.copy_(lora[name][1] / 2)  # alpha / rank
        folded = RoutedModel(checkpoint.with_lora(lora), units)
        gates = Gates("hard", THRESHOLD)
        torch.testing.assert_close(folded(ids, gates).logits, applied(ids, gates).logits, atol=1e-4, rtol=1e-4)
        plain = RoutedModel(checkpoint, units)(ids, gates).logits
        assert prediction_loss(folded(ids, gates).logits, ids, None) < prediction_loss(plain, ids, None)


def test_a_loss_that_is_not_finite_names_stage_and_step(small):
    checkpoint, units, ids = small
    with pytest.raises(UserError, match=r"polish: the loss is nan at step \d of 4"):
        train_polish(
            checkpoint,
            units,
            ids,
            threshold=THRESHOLD,
            sparsity=0.3,
            descent=dataclasses.replace(SHORT, lr=float("nan")),
        )


def test_batches_that_cannot_be_cut_are_refused(small):
    checkpoint, units, ids = small
    with pytest.raises(UserError, match="equal pieces of 2"):
        train_polish(checkpoint, units, ids, threshold=0.0, sparsity=0.3, descent=Descent(1, 3, 1e-3, micro_batch=2))

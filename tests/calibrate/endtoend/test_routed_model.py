"""The differentiable routed model: the same numbers as the streamed one, and gradients where they belong."""

import pytest
import torch
from models import random_routing, save_random

from ir_convert.calibrate.endtoend.gates import Gates, logistic_noise
from ir_convert.calibrate.endtoend.model import RoutedModel
from ir_convert.calibrate.endtoend.objective import prediction_loss, share_saved
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.evaluate import logits
from ir_convert.flops import Budget
from ir_convert.stream import run_routed

THRESHOLD = 0.3


def tokens(checkpoint, blocks=3, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, checkpoint.config.vocab_size, (blocks, length), generator=generator)


def trainable(model):
    for part in ("forecaster", "router"):
        for parameter in model.trainable(part):
            parameter.requires_grad_(True)
    return model


def gradients(model, part):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.trainable(part)]


def test_hard_gates_give_the_streamed_models_logits(random_model):
    _, _, checkpoint, routing = random_model
    ids = tokens(checkpoint)
    decoder = Decoder(checkpoint, torch.device("cpu"))
    for units in (routing.units, {key: routing.units[key] for key in routing.units if key[1] == "mlp"}):
        model = RoutedModel(checkpoint, units)
        with torch.no_grad():
            output, gates = model(ids, Gates("hard", THRESHOLD))
        torch.testing.assert_close(output, logits(decoder, units, ids, THRESHOLD), atol=1e-4, rtol=1e-4)
        assert gates.keys() == units.keys()
        assert 0.05 < torch.stack(list(gates.values())).mean() < 0.95


def test_strict_cache_gives_the_streamed_models_logits(random_model):
    _, _, checkpoint, routing = random_model
    ids = tokens(checkpoint)
    decoder = Decoder(checkpoint, torch.device("cpu"))
    x, approximated = run_routed(decoder, routing.units, ids, [THRESHOLD], "strict")
    model = RoutedModel(checkpoint, routing.units, kv_cache="strict")
    with torch.no_grad():
        output, gates = model(ids, Gates("hard", THRESHOLD))
        torch.testing.assert_close(output, decoder.head()(x[slice(0, len(ids))][:, 0]), atol=1e-4, rtol=1e-4)
    rates = {key: float(rate.mean()) for key, rate in approximated.items()}
    budget = Budget.of(checkpoint.config, routing.units, "strict")
    assert float(share_saved(gates, budget)) == pytest.approx(budget.sparsity(rates), abs=1e-5)


def test_dense_gates_give_the_base_model(random_model):
    _, base, checkpoint, routing = random_model
    ids = tokens(checkpoint)
    with torch.no_grad():
        output, gates = RoutedModel(checkpoint, routing.units)(ids, Gates("dense"))
        torch.testing.assert_close(output, base(ids).logits, atol=1e-4, rtol=1e-4)
    assert not gates


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_random("llama", path)
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, random_routing(checkpoint).units


def test_units_come_back_as_they_went_in_and_are_copies(small):
    checkpoint, units = small
    model = RoutedModel(checkpoint, units)
    with torch.no_grad():
        for key, routed in model.to_units().items():
            for name, tensor in routed.tensors().items():
                assert torch.equal(tensor, units[key].tensors()[name])
                tensor.add_(1)
    for key, routed in model.to_units().items():
        assert all(torch.equal(tensor, units[key].tensors()[name]) for name, tensor in routed.tensors().items())


def test_straight_through_gates_have_hard_values_and_a_sigmoids_gradient():
    score = torch.linspace(-2, 3, 11, requires_grad=True)
    gate = Gates("straight_through", 0.5, temperature=2.0).decide(score)
    assert torch.equal(gate, (score > 0.5).float())
    (slope,) = torch.autograd.grad(gate.sum(), score)
    soft = torch.sigmoid((score.detach() - 0.5) / 2)
    torch.testing.assert_close(slope, soft * (1 - soft) / 2)


def test_gumbel_gates_execute_as_often_as_the_logit_says():
    noise = logistic_noise((20000,), torch.Generator().manual_seed(0))
    gate = Gates("gumbel", 0.5).decide(torch.full((20000,), 1.5), noise)
    assert set(gate.tolist()) == {0.0, 1.0}
    assert float(gate.mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.01)


@pytest.mark.parametrize("rule", ["gumbel", "straight_through"])
def test_routers_get_gradients_and_the_base_none(small, rule):
    checkpoint, units = small
    model, ids = trainable(RoutedModel(checkpoint, units)), tokens(checkpoint)
    generator = torch.Generator().manual_seed(1)
    noise = {key: logistic_noise(tuple(ids.shape), generator) for key in units}
    prediction_loss(model(ids, Gates(rule, THRESHOLD), noise).logits, ids, None).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, "router"))
    routed = {id(p) for part in ("forecaster", "router") for p in model.trainable(part)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in routed)


def test_detached_gates_leave_forecasters_the_gradient_of_constant_gates(small):
    checkpoint, units = small
    model, ids = trainable(RoutedModel(checkpoint, units)), tokens(checkpoint)
    found = {}
    for name, gates in {
        "constant": Gates("hard", THRESHOLD),
        "detached": Gates("straight_through", THRESHOLD, into_stream=False),
        "live": Gates("straight_through", THRESHOLD),
    }.items():
        model.zero_grad()
        output = model(ids, gates)
        (prediction_loss(output.logits, ids, None) + 50 * torch.stack(list(output.gates.values())).mean()).backward()
        found[name] = gradients(model, "forecaster")
    for detached, constant in zip(found["detached"], found["constant"], strict=True):
        torch.testing.assert_close(detached, constant)
    pairs = zip(found["live"], found["constant"], strict=True)
    assert any((live - constant).abs().max() > 1e-3 for live, constant in pairs)


def test_gradient_checkpointing_changes_no_gradient(small):
    checkpoint, units = small
    ids, found = tokens(checkpoint), []
    for checkpointing in (False, True):
        model = trainable(RoutedModel(checkpoint, units, gradient_checkpointing=checkpointing))
        output = model(ids, Gates("straight_through", THRESHOLD))
        loss = prediction_loss(output.logits, ids, None) + 50 * torch.stack(list(output.gates.values())).mean()
        loss.backward()
        found.append([*gradients(model, "router"), *gradients(model, "forecaster")])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)

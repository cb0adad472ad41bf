"""The whole graph against torch: dense, routed, padded, in pieces; and how much work it really does."""

import math
from collections import Counter

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx_reference import Batch, batches, product_shapes, run_pieces

from ir_convert.families import experts_of, projection_sizes

PROPERTY = settings(max_examples=40, deadline=None)


@PROPERTY
@given(batch=batches())
def test_dense_is_the_base_model(exported, batch):
    model, reference = exported
    model.threshold = -math.inf
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions).logits
    real = batch.mask.bool()
    torch.testing.assert_close(run_pieces(model, batch)[real], expected[real], atol=1e-4, rtol=0)


@PROPERTY
@given(batch=batches(), threshold=st.one_of(st.floats(-4, 4), st.just(math.inf)))
def test_routed_is_the_method(exported, batch, threshold):
    model, reference = exported
    expected = reference(batch.ids, batch.mask, threshold)
    assume(reference.margin > 1e-4)  # nearer than that, rounding decides
    model.threshold = threshold
    got = run_pieces(model, batch)
    assert torch.isfinite(got).all()
    real = batch.mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


@PROPERTY
@given(batch=batches(), wanted=st.integers(1, 3))
def test_a_single_executed_token(exported, batch, wanted):
    """A threshold just under the best scores of some unit: one or a few tokens of the whole batch execute there."""
    model, reference = exported
    real = batch.mask.bool()
    reference(batch.ids, batch.mask, math.inf)
    ranked = reference.scores[0, "attention"][real].detach().sort(descending=True).values
    assume(len(ranked) > wanted)
    threshold = float((ranked[wanted - 1] + ranked[wanted]) / 2)
    expected = reference(batch.ids, batch.mask, threshold)
    assume(reference.margin > 1e-4)
    assert reference.decisions[0, "attention"].sum() == wanted
    model.threshold = threshold
    torch.testing.assert_close(run_pieces(model, batch)[real], expected[real], atol=1e-4, rtol=0)


def test_approximated_tokens_skip_the_products(exported, tmp_path):
    """Rows that enter the matrix products inside ONNX Runtime, by its own profile, against the decisions."""
    model, reference = exported
    torch.manual_seed(5)
    batch = Batch(torch.randint(3, 131, (3, 16)), torch.ones(3, 16, dtype=torch.long), [16])
    batch.mask[1, :6] = 0
    config = reference.model.config
    sizes = projection_sizes(config)
    # One operator computes all experts; its output is as wide as that of down_proj.
    mlp = ("gate_proj", "up_proj", "down_proj") if experts_of(config) is None else ("gate", "down_proj")
    thresholds = [-math.inf, -1.0, 0.5, 2.0, math.inf]
    for threshold, shapes in zip(thresholds, product_shapes(model, batch, thresholds, tmp_path), strict=True):
        reference(batch.ids, batch.mask, threshold)
        assert reference.margin > 1e-5
        rows: Counter[int] = Counter()
        for shape in shapes:
            # [n, width] or [1, n, width]; K and V run for every token: [B, S, width].
            if shape[:-1] != list(batch.ids.shape):
                rows[shape[-1]] += math.prod(shape[:-1])

        executed = dict.fromkeys(("attention", "mlp"), 0)
        for (_, unit), decision in reference.decisions.items():
            executed[unit] += int(decision.sum())
        expected: Counter[int] = Counter()
        for unit, names in {"attention": ("q_proj", "o_proj"), "mlp": mlp}.items():
            for name in names:
                expected[sizes[name][1]] += executed[unit]
        assert +rows == +expected, threshold


def test_threshold_is_optional(exported):
    model, reference = exported
    ids = np.random.default_rng(0).integers(3, 131, (2, 9))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(9), (2, 1))}
    feed |= dict(zip((value.name for value in model._past_inputs), model._empty_cache(2), strict=True))
    assert "routing_threshold" not in {value.name for value in model.session.get_inputs()}
    assert "routing_threshold" in {value.name for value in model.session.get_overridable_initializers()}

    def logits(**given: np.ndarray) -> np.ndarray:
        return model.session.run(["logits"], feed | given)[0]

    def threshold(value: float) -> np.ndarray:
        return np.array([value], np.float32)

    np.testing.assert_array_equal(logits(), logits(routing_threshold=threshold(reference.routing.threshold)))
    assert np.abs(logits() - logits(routing_threshold=threshold(-math.inf))).max() > 1e-3


def test_contract(exported):
    """Names, types and shapes that ORTModelForCausalLM and others rely on."""
    session, config = exported[0].session, exported[1].model.config
    kv, head = config.num_key_value_heads, exported[0]._past_inputs[0].shape[3]
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    expected = {
        "input_ids": ("tensor(int64)", ["batch", "sequence"]),
        "attention_mask": ("tensor(int64)", ["batch", "total"]),
        "position_ids": ("tensor(int64)", ["batch", "sequence"]),
    }
    outputs = {"logits": ("tensor(float)", ["batch", "sequence", config.vocab_size])}
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            expected[f"past_key_values.{layer}.{part}"] = ("tensor(float)", ["batch", kv, "past", head])
            outputs[f"present.{layer}.{part}"] = ("tensor(float)", ["batch", kv, "present", head])
    outputs["routing_saved"] = ("tensor(float)", [1])
    assert inputs == expected
    assert {value.name: (value.type, value.shape) for value in session.get_outputs()} == outputs
    assert [value.name for value in session.get_outputs()] == list(outputs)

"""Whatever a routing file asks for, the checkpoint computes: against calibration's own forward pass."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx_reference import batches
from products import watch
from routed_models import tokens, write_and_load
from stream_reference import StreamReference
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from variants import VARIANTS, Variant

from ir_convert.decoder import attention_kernel
from ir_convert.families import UNITS, projection_sizes
from ir_convert.flops import Budget, forecaster_flops, router_flops

# Every new way of keeping, or of not keeping, keys and values; some units as they were.
VARIANTS = VARIANTS | {
    "gemma2, strict": Variant("gemma2", "strict", missing=((1, "mlp"),)),
    "gemma3, strict": Variant("gemma3", "strict", missing=((1, "attention"),)),
    "phi3, strict": Variant("phi3", "strict"),
    "olmo2, strict": Variant("olmo2", "strict", missing=((0, "attention"), (1, "mlp"))),
    "smollm3, strict": Variant("smollm3", "strict"),
    "granite": Variant("granite", missing=((1, "attention"), (2, "mlp")), sized=True),
    "qwen3_moe, strict": Variant("qwen3_moe", "strict", missing=((1, "mlp"),)),
}
PROPERTY = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
thresholds = st.one_of(st.floats(-4, 4), st.sampled_from([-math.inf, math.inf]))
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory) -> tuple[PreTrainedModel, StreamReference]:
    """(the checkpoint's model, its reference) of every variant."""
    checkpoint, routing = VARIANTS[request.param].make(tmp_path_factory.mktemp("base"))
    model = write_and_load(checkpoint, routing, tmp_path_factory.mktemp("made") / "ir")
    return model, StreamReference(checkpoint, routing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@PROPERTY
@given(batch=batches(), threshold=thresholds)
@torch.no_grad()
def test_logits(variant, attention, batch, threshold):
    """In pieces, over a cache."""
    model, reference = variant
    if attention == "sdpa" and attention_kernel(reference.decoder.config) == "eager":
        pytest.skip("this model has a soft cap, which sdpa has not")
    expected = reference(batch.ids, batch.mask, threshold)
    assume(expected.margin > 1e-4)  # nearer than that, rounding decides
    model.set_attn_implementation(attention)
    model.config.routing_threshold = threshold
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    logits, end, cache = [], 0, DynamicCache(config=model.config)
    for piece in batch.pieces:
        start, end = end, end + piece
        given = {"attention_mask": batch.mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(batch.ids[:, start:end], past_key_values=cache, **given).logits)
    got, real = torch.cat(logits, 1), batch.mask.bool()
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[real], expected.logits[real], atol=1e-4, rtol=0)


@PROPERTY
@given(batch=batches(), threshold=thresholds)
@torch.no_grad()
def test_statistics_and_skipped_work(variant, batch, threshold):
    """Rows that reach each projection are the executed tokens; without a cache."""
    model, reference = variant
    decoder, routing = reference.decoder, reference.routing
    every = torch.ones_like(batch.mask)
    expected = reference(batch.ids, every, threshold)
    assume(expected.margin > 1e-4)
    model.set_attn_implementation(attention_kernel(decoder.config))
    model.config.routing_threshold = threshold
    family, layers = decoder.checkpoint.family, model.model.layers
    units = {(i, unit): getattr(layer, family.unit(unit).module) for i, layer in enumerate(layers) for unit in UNITS}
    with model.routing_statistics() as seen, watch(model, units) as routed:
        logits = model(batch.ids).logits
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)

    sizes, tokens = projection_sizes(decoder.config), batch.ids.numel()
    assert set(units) <= set(routed.flops)
    for (index, unit), flops in ((key, routed.flops[key]) for key in units):
        places, routed_unit = family.unit(unit), routing.units.get((index, unit))
        executed = int(expected.executed[index, unit].sum()) if routed_unit else tokens
        always = () if routing.kv_cache == "strict" else places.kept
        projected = {name: tokens if name in always else executed for name in places.skipped + places.kept}
        work = sum(2 * rows * sizes[name][0] * sizes[name][1] for name, rows in projected.items())
        if routed_unit:
            hidden = decoder.config.hidden_size
            work += tokens * router_flops(hidden, routed_unit.router.width) * (threshold > -math.inf)
            work += tokens * forecaster_flops(hidden, routed_unit.forecaster.rank) * (executed < tokens)
        assert flops == work

    rates = {key: 1 - executed.float().mean().item() for key, executed in expected.executed.items()}
    assert set(seen.counts) == set(rates)
    budget = Budget.of(decoder.config, routing.units, routing.kv_cache)
    dense = threshold == -math.inf  # then routers and forecasters do not run either
    assert seen.sparsity == pytest.approx(0 if dense else budget.sparsity(rates), abs=1e-6)
    assert seen.decisions == pytest.approx(budget.decisions(rates), abs=1e-6)


@torch.no_grad()
def test_cache_holds_executed_tokens_only_where_strict(variant):
    model, reference = variant
    ids = tokens(3, 14)
    every = torch.ones_like(ids)
    model.config.routing_threshold = 0.0
    expected = reference(ids, every, 0.0)
    assert expected.margin > 1e-5
    strict, cache = reference.routing.kv_cache == "strict", DynamicCache()
    model(ids, past_key_values=cache)
    for index in range(3):
        kept = expected.executed.get((index, "attention"), every.bool()) if strict else every.bool()
        for part in (cache.layers[index].keys, cache.layers[index].values):
            assert part.ne(0).any(-1).any(1).equal(kept)


@torch.no_grad()
def test_dense_is_the_base_model(variant):
    """Its low-rank changes folded in by hand."""
    model, reference = variant
    kernel = attention_kernel(reference.decoder.config)
    path = reference.decoder.checkpoint.path
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=kernel).eval()
    for name, (a, b) in reference.routing.lora.items():
        base.get_parameter(name).add_(b @ a)
    model.set_sparsity(0)
    ids = tokens(2, 15)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_greedy_with_any_cache(variant):
    model, reference = variant
    model.config.routing_threshold = reference.routing.threshold
    rows = [tokens(1, length, seed=length) for length in (5, 11, 8)]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = (ids > 0).long()
    with model.routing_statistics() as seen:
        together = model.generate(ids, attention_mask=mask, **GREEDY)[:, 11:]
    assert 0.1 < seen.decisions < 0.9
    static = model.generate(ids, attention_mask=mask, **GREEDY, cache_implementation="static")[:, 11:]
    assert static.equal(together)
    for row, expected in zip(rows, together, strict=True):
        for use_cache in (True, False):
            assert model.generate(row, **GREEDY, use_cache=use_cache)[0, row.shape[1] :].equal(expected)


@torch.no_grad()
def test_gradients_are_finite(variant):
    model, _ = variant
    model.config.routing_threshold = 0.0
    ids = tokens(2, 9)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    assert len(gradients) > 20
    assert all(gradient.isfinite().all() for gradient in gradients)

"""Whatever a routing file asks for, ONNX Runtime computes: against calibration's own forward pass."""

import math
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx_reference import Batch, batches, product_shapes, run_pieces
from stream_reference import StreamReference
from variants import VARIANTS

from ir_convert.export.onnx import write
from ir_convert.families import experts_of, head_dim, projection_sizes
from ir_convert.flops import Budget
from ir_convert.runtime import OnnxModel

PROPERTY = settings(max_examples=25, deadline=None)
thresholds = st.one_of(st.floats(-4, 4), st.sampled_from([-math.inf, math.inf]))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """(the runtime's model, its reference) of every variant."""
    checkpoint, routing = VARIANTS[request.param].make(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("onnx")
    write(checkpoint, routing, folder, "ir-tiny.onnx")
    return OnnxModel.load(folder, threads=1), StreamReference(checkpoint, routing)


def padded_batch() -> Batch:
    ids = torch.randint(3, 131, (3, 16), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids, torch.ones_like(ids), [16])
    batch.mask[1, :6] = 0
    return batch


@PROPERTY
@given(batch=batches(), threshold=thresholds)
def test_logits(variant, batch, threshold):
    model, reference = variant
    expected = reference(batch.ids, batch.mask, threshold)
    assume(expected.margin > 1e-4)  # nearer than that, rounding decides
    model.threshold = threshold
    got = run_pieces(model, batch)
    assert torch.isfinite(got).all()
    real = batch.mask.bool()
    torch.testing.assert_close(got[real], expected.logits[real], atol=1e-4, rtol=0)


@PROPERTY
@given(batch=batches(), threshold=thresholds)
def test_says_what_it_saved(variant, batch, threshold):
    model, reference = variant
    decoder, routing = reference.decoder, reference.routing
    expected = reference(batch.ids, batch.mask, threshold)
    assume(expected.margin > 1e-4)
    model.threshold = threshold
    model.logits(batch.ids.numpy(), batch.mask.numpy())
    tokens = int(batch.mask.sum())
    rates = {key: 1 - int(executed.sum()) / tokens for key, executed in expected.executed.items()}
    budget = Budget.of(decoder.config, routing.units, routing.kv_cache)
    assert model.saved == pytest.approx(budget.sparsity(rates), abs=1e-6)


@PROPERTY
@given(batch=batches(), threshold=thresholds)
def test_cache_holds_executed_tokens_only_where_strict(variant, batch, threshold):
    model, reference = variant
    expected = reference(batch.ids, batch.mask, threshold)
    assume(expected.margin > 1e-4)
    model.threshold = threshold
    _, cache = model.forward(batch.ids.numpy(), batch.mask.numpy())
    strict, every = reference.routing.kv_cache == "strict", torch.ones_like(batch.mask).bool()
    for layer in range(3):
        kept = expected.executed.get((layer, "attention"), every) if strict else every
        for part in cache[2 * layer : 2 * layer + 2]:
            np.testing.assert_array_equal((part != 0).any(axis=(1, 3)), kept.numpy())


def test_approximated_tokens_skip_the_products(variant, tmp_path):
    """Rows that enter the matrix products inside ONNX Runtime, by its own profile, against the decisions."""
    model, reference = variant
    batch, config = padded_batch(), reference.decoder.config
    strict, sizes = reference.routing.kv_cache == "strict", projection_sizes(config)
    if experts_of(config) is not None:  # one operator computes all experts; its output is as wide as that of down_proj
        del sizes["gate_proj"], sizes["up_proj"]
    thresholds = [-math.inf, 0.0, 1.5, math.inf]
    for threshold, shapes in zip(thresholds, product_shapes(model, batch, thresholds, tmp_path), strict=True):
        expected = reference(batch.ids, batch.mask, threshold)
        assert expected.margin > 1e-5
        rows: Counter[int] = Counter()
        for shape in shapes:
            rows[shape[-1]] += math.prod(shape[:-1])

        counted: Counter[int] = Counter()
        for layer in range(3):
            for projection, (_, width) in sizes.items():
                unit = "attention" if projection[0] in "qkvo" else "mlp"
                executed = expected.executed.get((layer, unit))
                every = executed is None or (projection[0] in "kv" and not strict)
                counted[width] += batch.ids.numel() if every else int(executed.sum())
        assert +rows == +counted, threshold


def test_holds_no_node_for_what_is_not_routed(variant):
    model, reference = variant
    proto = onnx.load(model.path, load_external_data=False)
    units, strict = reference.routing.units, reference.routing.kv_cache == "strict"
    nodes = [node for node in proto.graph.node if node.domain == "ir" and node.op_type != "Decide"]
    called = {node.name.split("/")[0]: node.op_type for node in nodes}
    for layer in range(3):
        routed = "RoutedAttentionStrict" if strict else "RoutedAttention"
        kind = routed if (layer, "attention") in units else "DenseAttention"
        assert called[f"layers.{layer}.attention"] == kind
        mlp = "MLP" if experts_of(reference.decoder.config) is None else "MoE"
        assert called[f"layers.{layer}.mlp"] == ("Routed" if (layer, "mlp") in units else "Dense") + mlp
    assert {function.name for function in proto.functions} == {*called.values(), *(["Decide"] if units else [])}
    outputs = {name for node in proto.graph.node for name in node.output}
    scored = {(int(name.split(".")[1]), name.split(".")[2]) for name in outputs if name.endswith(".score")}
    assert scored == set(units)
    onnx.checker.check_model(model.path, full_check=True)
    for key, unit in units.items():
        assert model.metadata["rank"][key[1]][key[0]] == unit.forecaster.rank
        assert model.metadata["router_width"][key[1]][key[0]] == unit.router.width
    assert sum(rank is not None for ranks in model.metadata["rank"].values() for rank in ranks) == len(units)
    assert model.metadata["kv_cache"] == reference.routing.kv_cache
    assert model._past_inputs[0].shape[3] == head_dim(reference.decoder.config)


def test_strict_in_float16(tmp_path):
    checkpoint, routing = VARIANTS["strict"].make(tmp_path)
    (tmp_path / "onnx").mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx", dtype=torch.float16)
    model, batch = OnnxModel.load(tmp_path / "onnx", threads=1, threshold=0.0), padded_batch()
    reference = StreamReference(checkpoint, routing)
    expected = reference(batch.ids, batch.mask, 0.0)
    _, cache = model.forward(batch.ids.numpy(), batch.mask.numpy())
    first = expected.executed[0, "attention"].numpy()  # later layers may decide otherwise after rounding
    np.testing.assert_array_equal((cache[0] != 0).any(axis=(1, 3)), first)
    assert torch.isfinite(run_pieces(model, batch)).all()
    model.threshold = -math.inf
    got = run_pieces(model, batch)
    expected = reference(batch.ids, batch.mask, -math.inf).logits
    real = batch.mask.bool()
    assert (got.float() - expected)[real].abs().max() < 0.02 * expected.abs().max()

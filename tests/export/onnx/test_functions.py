"""The MLP functions on their own, against plain torch: any execute mask, every optional input, every variant; all signatures."""

import onnx_ir as ir
import torch
from function_call import (
    EPSILON,
    FFN,
    D,
    activations,
    added,
    execute_mask,
    execute_masks,
    factors,
    methods,
    quantised,
    quantised_experts,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ir_convert.export.onnx.body import Features
from ir_convert.export.onnx.functions import INT4_DOMAIN, ROUTING, attention, decide, mlp, moe
from ir_convert.export.onnx.int4 import Int4

PROPERTY = settings(max_examples=200, deadline=None)


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    kind=execute_masks,
    method=methods,
    given=st.sets(st.sampled_from(["gate_bias", "up_bias", "down_bias", "post_norm"])),
    routed=st.booleans(),
    activation=st.sampled_from(list(activations)),
    factor=factors,
)
def test_mlp(seed, batch, length, kind, method, given, routed, activation, factor):
    torch.manual_seed(seed)
    shapes = {"gate_weight": (D, FFN), "up_weight": (D, FFN), "down_weight": (FFN, D)}
    shapes |= {name: (D if name in ("down_bias", "post_norm") else FFN,) for name in sorted(given)}
    x = {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"execute": execute_mask(kind, batch, length)} | {name: torch.randn(shape) for name, shape in shapes.items()}

    inputs, int4 = quantised(x, method)
    optional = [name for name in inputs if name.endswith(("_bias", "_norm", "_zero_points"))]

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)

    dense = added(linear(activations[activation](linear(x["h"], "gate")) * linear(x["h"], "up"), "down"), x, factor)
    expected = torch.where(x["execute"][..., None], dense, x["forecast"]) if routed else dense
    function = mlp(optional, routed, int4=int4, features=Features(activation, scaled=factor != 1))
    attributes = {"epsilon": EPSILON, "residual_multiplier": factor, "activation": activation}
    (got,) = run(function, inputs, **attributes)
    assert ("Gelu" in operators(function)) == (activation != "silu")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    kind=execute_masks,
    experts=st.integers(2, 6),
    active=st.integers(1, 2),
    method=st.sampled_from([None, None, "rtn", "rtn_asym", "k_quant"]),
    normalize=st.booleans(),
    post_norm=st.booleans(),
    routed=st.booleans(),
    factor=factors,
)
def test_moe(seed, batch, length, kind, experts, active, method, normalize, post_norm, routed, factor):
    torch.manual_seed(seed)
    d, ffn = (D, FFN) if method is None else (64, 32)  # whole blocks
    x = {"h": torch.randn(batch, length, d), "forecast": torch.randn(batch, length, d)}
    x |= {"execute": execute_mask(kind, batch, length), "gate_weight": torch.randn(d, experts) * d**-0.5}
    x |= {"gate_up_weight": torch.randn(experts, 2 * ffn, d) * d**-0.5, "down_weight": torch.randn(experts, d, ffn)}
    if post_norm:
        x["post_norm"] = torch.randn(d)
    inputs, int4 = quantised_experts(x, method)
    shares = (x["h"] @ x["gate_weight"]).softmax(-1)
    least = shares.topk(active).values[..., -1:]
    weights = torch.where(shares >= least, shares, 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = (torch.einsum("bsd,efd->bsef", x["h"], x["gate_up_weight"][:, part::2]) for part in (0, 1))
    each = torch.einsum("bsef,edf->bsed", F.silu(gate) * up, x["down_weight"])
    dense = added((weights[..., None] * each).sum(2), x, factor)
    expected = torch.where(x["execute"][..., None], dense, x["forecast"]) if routed else dense
    optional = [name for name in inputs if name.endswith(("_norm", "_zero_points"))]
    function = moe(optional, routed, int4=int4, features=Features(scaled=factor != 1, normalised=normalize))
    attributes = {"experts_per_token": active, "normalize": int(normalize), "residual_multiplier": factor}
    (got,) = run(function, inputs, epsilon=EPSILON, **attributes)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def nodes(function: ir.Function) -> list[ir.Node]:
    return list(ir.traversal.RecursiveGraphIterator(function))


def operators(function: ir.Function) -> set[str]:
    return {node.op_type for node in nodes(function)}


def test_bodies_hold_no_node_for_what_is_absent():
    for build in (mlp, attention, moe):
        plain, scaled = build(), build(features=Features(scaled=True))
        assert "RMSNormalization" not in operators(plain)
        assert "RMSNormalization" in operators(build(["post_norm"]))
        assert "Mul" in operators(scaled)
        assert len(nodes(scaled)) - len(nodes(plain)) == 3  # the factor, its type, the product


def test_attributes_may_be_left_out():
    """Each has a default that changes nothing."""
    torch.manual_seed(0)
    x = {"h": torch.randn(1, 3, D), "gate_weight": torch.randn(D, FFN), "up_weight": torch.randn(D, FFN)}
    x["down_weight"] = torch.randn(FFN, D)
    (got,) = run(mlp(routed=False), x)
    expected = (F.silu(x["h"] @ x["gate_weight"]) * (x["h"] @ x["up_weight"])) @ x["down_weight"]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_signatures_are_stable():
    """A native library registers kernels for these; changing one breaks files that are out in the world."""
    decision = "h threshold down_weight down_bias up_weight up_bias hidden_weight hidden_bias out_weight out_bias"
    for forecasts in (True, False):
        function = decide(forecasts)
        assert (function.domain, function.name, list(function.attributes)) == ("ir", "Decide", [])
        assert [value.name for value in function.inputs] == decision.split()
        assert [value.name for value in function.outputs] == ["forecast", "execute", "score"]
        assert (function.doc_string or "").endswith("execute = score > threshold.")
    function = decide(int4=Int4())
    assert (function.domain, function.name, list(function.attributes)) == (
        INT4_DOMAIN,
        "Decide",
        ["hidden_size", "rank", "codes"],
    )
    assert [value.name for value in function.inputs] == [*decision.split(), "down_scales", "up_scales", "hidden_scales"]
    mlp_inputs = "h forecast execute gate_weight up_weight down_weight gate_bias up_bias down_bias post_norm"
    moe_inputs = "h forecast execute gate_weight gate_up_weight down_weight post_norm"
    attention_inputs = (
        "h forecast execute cos sin mask step_bias start total step past_key past_value q_weight k_weight v_weight o_weight "
        "q_bias k_bias v_bias o_bias q_norm k_norm post_norm"
    )
    attention_attributes = "num_heads kv_num_heads head_dim scale softcap rotary_dim"
    attention_outputs = ["output", "present_key", "present_value"]
    norms = ["q_norm", "k_norm"]
    int4 = {name: {} for name in ("gate", "up", "down")}
    int4_inputs = " gate_scales up_scales down_scales gate_zero_points up_zero_points down_zero_points"
    quantised_mlp = mlp(int4=int4 | {name: Int4().attributes(8, 8) for name in int4})
    assert (quantised_mlp.domain, quantised_mlp.name) == (INT4_DOMAIN, "RoutedMLP")
    assert [value.name for value in quantised_mlp.inputs] == (mlp_inputs + int4_inputs).split()
    quantised_moe = moe(int4=dict.fromkeys(("gate_up", "down"), Int4().expert_attributes))
    assert (quantised_moe.domain, quantised_moe.name) == (INT4_DOMAIN, "RoutedMoE")
    int4_inputs = " gate_up_scales down_scales gate_up_zero_points down_zero_points"
    assert [value.name for value in quantised_moe.inputs] == (moe_inputs + int4_inputs).split()
    for function, name, inputs, outputs in (
        (mlp(), "RoutedMLP", mlp_inputs, ["output"]),
        (mlp(routed=False), "DenseMLP", mlp_inputs, ["output"]),
        (moe(), "RoutedMoE", moe_inputs, ["output"]),
        (moe(routed=False), "DenseMoE", moe_inputs, ["output"]),
        (attention(norms), "RoutedAttention", attention_inputs, attention_outputs),
        (attention(norms, kv_cache="strict"), "RoutedAttentionStrict", attention_inputs, attention_outputs),
        (attention(norms, routed=False), "DenseAttention", attention_inputs, attention_outputs),
    ):
        routed = name.startswith("Routed")
        assert (function.domain, function.name) == ("ir", name)
        assert [value.name for value in function.inputs] == [n for n in inputs.split() if routed or n not in ROUTING]
        assert [value.name for value in function.outputs] == outputs
        own = {"MLP": "activation", "MoE": "experts_per_token normalize"}.get(name[-3:], attention_attributes)
        assert list(function.attributes) == [*own.split(), "epsilon", "residual_multiplier"]
        assert ("where execute, forecast elsewhere" in (function.doc_string or "").replace("\n", " ")) == routed

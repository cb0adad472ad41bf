"""The units on their own, against plain torch: any execute mask, any padding, every optional input, every variant."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder
from torch import Tensor
from torch.nn import functional as F

from ir_convert.export.onnx.body import Features
from ir_convert.export.onnx.functions import (
    INT4_DOMAIN,
    OPSETS,
    ROUTING,
    VERSION,
    attention,
    decide,
    mlp,
    moe,
)
from ir_convert.export.onnx.int4 import Int4, quantise
from ir_convert.units import Forecaster, RoutedUnit, Router

PROPERTY = settings(max_examples=300, deadline=None)
D, FFN, HEAD, EPSILON = 12, 20, 8, 1e-5
TYPES = {
    torch.bool: ir.DataType.BOOL,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.float16: ir.DataType.FLOAT16,
    torch.float32: ir.DataType.FLOAT,
}

methods = st.sampled_from([None, None, "rtn", "k_quant", "hqq"])
factors = st.sampled_from([1.0, 1.0, 0.4])
activations = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
execute_masks = st.sampled_from(["none", "one", "all", "random", "ragged"])


def execute_mask(kind: str, batch: int, length: int) -> Tensor:
    execute = torch.zeros(batch, length, dtype=torch.bool)
    if kind == "one":
        execute[torch.randint(batch, ()), torch.randint(length, ())] = True
    elif kind == "all":
        execute[:] = True
    elif kind == "random":
        execute = torch.rand(batch, length) < 0.5
    elif kind == "ragged":  # nothing in the first sequence, everything in the last
        execute = torch.rand(batch, length) < torch.linspace(0, 1, batch)[:, None]
    return execute


def run(
    function: ir.Function, values: dict[str, Tensor], types: dict[str, ir.DataType] | None = None, **attributes: float
) -> list[Tensor]:
    """Runs a model that holds nothing but one call of the function; outputs are float32, but for those of other ``types``."""
    graph = ir.Graph([], [], nodes=[], opset_imports={**OPSETS, function.domain: VERSION}, name="call")
    builder = GraphBuilder(graph)
    inputs = {name: builder.input(name, TYPES[value.dtype], [None] * value.ndim) for name, value in values.items()}
    kinds = [(types or {}).get(str(output.name), ir.DataType.FLOAT) for output in function.outputs]
    outputs = [ir.Value(name=f"out{i}", type=ir.TensorType(kind)) for i, kind in enumerate(kinds)]
    builder.call(function, *(inputs.get(value.name) for value in function.inputs), _outputs=outputs, **attributes)
    graph.outputs.extend(outputs)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=11, functions=[function]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()})
    return [torch.from_numpy(result) for result in results]


def quantised(x: dict[str, Tensor], method: str | None) -> tuple[dict[str, Tensor], dict[str, dict[str, int]] | None]:
    """Quantises the weights among a unit's inputs, in place to what they then are; returns the inputs, and the attributes."""
    if method is None:
        return dict(x), None
    int4, inputs, attributes = Int4(method, accuracy_level=1), dict(x), {}
    for name in [name for name in x if name.endswith("_weight")]:
        projection, packed = name.removesuffix("_weight"), quantise(x[name].T, int4)
        x[name] = packed.dequantised().T
        inputs |= {f"{projection}_{part}": tensor for part, tensor in packed.parts().items()}
        attributes[projection] = int4.attributes(*x[name].T.shape)
    return inputs, attributes


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    rank=st.integers(0, 5),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16]),
    kind=execute_masks,
)
def test_decide(seed, batch, length, rank, width, dtype, kind):
    torch.manual_seed(seed)
    forecaster = Forecaster(torch.randn(rank, D), torch.randn(rank), torch.randn(D, rank), torch.randn(D))
    forecaster = Forecaster(*(vars(forecaster)[name].to(dtype) for name in vars(forecaster)))
    router = Router(torch.randn(width, D), torch.randn(width), torch.randn(1, width), torch.randn(1))
    h = torch.randn(batch, length, D).to(dtype)
    score = RoutedUnit(forecaster, router).router(h.float())
    wanted = execute_mask(kind, batch, length)
    x = {"h": h, "threshold": score + torch.where(wanted, -1.0, 1.0)}
    if kind in ("none", "all"):
        x["threshold"] = torch.full((batch, length), -torch.inf if kind == "all" else torch.inf)
    if rank:
        x |= {"down_weight": forecaster.down.T, "down_bias": forecaster.down_bias, "up_weight": forecaster.up.T}
    x |= {"up_bias": forecaster.bias, "hidden_weight": router.hidden.T, "hidden_bias": router.hidden_bias}
    x |= {"out_weight": router.out[0], "out_bias": router.out_bias}
    types = {"forecast": TYPES[dtype], "execute": ir.DataType.BOOL}
    forecast, execute, got = run(decide(rank > 0, TYPES[dtype]), x, types)
    assert execute.equal(wanted)
    torch.testing.assert_close(got, score, atol=1e-4, rtol=1e-5)
    expected = Forecaster(*(part.float() for part in vars(forecaster).values()))(h.float())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(forecast.float(), expected, atol=tolerance, rtol=tolerance)


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
    normalize=st.booleans(),
    post_norm=st.booleans(),
    routed=st.booleans(),
    factor=factors,
)
def test_moe(seed, batch, length, kind, experts, active, normalize, post_norm, routed, factor):
    torch.manual_seed(seed)
    x = {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"execute": execute_mask(kind, batch, length), "gate_weight": torch.randn(D, experts)}
    x |= {"gate_up_weight": torch.randn(experts, 2 * FFN, D), "down_weight": torch.randn(experts, D, FFN)}
    if post_norm:
        x["post_norm"] = torch.randn(D)
    shares = (x["h"] @ x["gate_weight"]).softmax(-1)
    least = shares.topk(active).values[..., -1:]
    weights = torch.where(shares >= least, shares, 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = (torch.einsum("bsd,efd->bsef", x["h"], x["gate_up_weight"][:, part::2]) for part in (0, 1))
    each = torch.einsum("bsef,edf->bsed", F.silu(gate) * up, x["down_weight"])
    dense = added((weights[..., None] * each).sum(2), x, factor)
    expected = torch.where(x["execute"][..., None], dense, x["forecast"]) if routed else dense
    function = moe(["post_norm"] * post_norm, routed, features=Features(scaled=factor != 1))
    attributes = {"experts_per_token": active, "normalize": int(normalize), "residual_multiplier": factor}
    (got,) = run(function, x, epsilon=EPSILON, **attributes)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.one_of(st.just(1), st.integers(1, 7)),
    past=st.integers(0, 5),
    spare=st.sampled_from([None, 0, 3]),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    kind=execute_masks,
    method=methods,
    optional=st.sets(st.sampled_from(["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "post_norm"])),
    variant=st.sampled_from(["full", "strict", "dense"]),
    rotary_dim=st.sampled_from([0, 0, 4]),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    whole_norms=st.booleans(),
    factor=factors,
)
def test_attention(
    seed,
    batch,
    length,
    past,
    spare,
    groups,
    kv_heads,
    kind,
    method,
    optional,
    variant,
    rotary_dim,
    softcap,
    whole_norms,
    factor,
):
    torch.manual_seed(seed)
    heads, total = groups * kv_heads, past + length
    q, kv = heads * HEAD, kv_heads * HEAD
    shapes = {"q_weight": (D, q), "k_weight": (D, kv), "v_weight": (D, kv), "o_weight": (q, D)}
    shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (D,), "post_norm": (D,)}
    shapes |= {"q_norm": (q if whole_norms else HEAD,), "k_norm": (kv if whole_norms else HEAD,)}
    x = {name: torch.randn(shape) for name, shape in shapes.items() if name.endswith("_weight") or name in optional}
    inputs, int4 = quantised(x, method)
    optional = [name for name in inputs if not name.endswith(("_weight", "_scales"))]
    rotated = rotary_dim or HEAD
    angles = torch.rand(batch, length, rotated // 2) * 6
    x |= {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"cos": angles.cos(), "sin": angles.sin(), "execute": execute_mask(kind, batch, length)}
    x |= {f"past_{part}": torch.randn(batch, kv_heads, past, HEAD) for part in ("key", "value")}
    x["mask"] = torch.rand(batch, length, total) < 0.6
    # What is computed sees itself; a token that does not execute may see nothing at all.
    computed = torch.ones_like(x["execute"]) if variant == "dense" else x["execute"]
    x["mask"] |= (torch.arange(total) == past + torch.arange(length)[:, None]) & computed[..., None]
    kept = torch.ones(batch, total, dtype=torch.bool)
    if variant == "strict":
        kept = torch.cat((torch.rand(batch, past) < 0.5, x["execute"]), 1)
        for part in ("key", "value"):
            x[f"past_{part}"] *= kept[:, None, :past, None]

    def project(name: str, count: int, rotate: bool) -> Tensor:
        y = x["h"] @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)
        if not whole_norms:
            y = y.view(batch, length, count, HEAD)
        if (norm := x.get(f"{name}_norm")) is not None:
            y = F.rms_norm(y, norm.shape, norm, EPSILON)
        y = y.view(batch, length, count, HEAD).transpose(1, 2)
        if not rotate:
            return y
        cos, sin = (part.repeat(1, 1, 2).unsqueeze(1) for part in (x["cos"], x["sin"]))
        y, rest = y[..., :rotated], y[..., rotated:]
        a, b = y.chunk(2, -1)
        return torch.cat((y * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    key = torch.cat((x["past_key"], project("k", kv_heads, True)), 2) * kept[:, None, :, None]
    value = torch.cat((x["past_value"], project("v", kv_heads, False)), 2) * kept[:, None, :, None]
    scores = project("q", heads, True) @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~(x["mask"] & kept[:, None])[:, None], -torch.inf).softmax(-1)
    y = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, length, q)
    dense = added(y @ x["o_weight"] + x.get("o_bias", 0), x, factor)

    if spare is not None:  # a buffer with room; nothing of what lies in its unused slots may be seen
        for part in ("key", "value"):
            unused = torch.full((batch, kv_heads, length + spare, HEAD), torch.nan)
            x[f"past_{part}"] = torch.cat((x[f"past_{part}"], unused), 2)
    x["start"] = torch.full((batch,), past, dtype=torch.int32)
    x["total"] = torch.tensor([total], dtype=torch.int32)
    x["step"] = torch.tensor([batch == length == 1 and spare is not None])
    x["step_bias"] = torch.zeros(batch, 1, 1, total).masked_fill(~x["mask"][:, None, -1:], -torch.inf)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": HEAD, "scale": 0.3, "epsilon": EPSILON}
    attributes |= {"softcap": softcap, "rotary_dim": rotary_dim, "residual_multiplier": factor}
    features = Features(whole_norms=whole_norms, scaled=factor != 1)
    kv_cache = "strict" if variant == "strict" else "full"
    function = attention(optional, variant != "dense", kv_cache, int4=int4, features=features)
    output, *present = run(function, x | inputs, **attributes)
    assert all(part.shape[2] == total + (spare or 0) for part in present)
    present_key, present_value = (part[:, :, :total] for part in present)
    expected = dense if variant == "dense" else torch.where(x["execute"][..., None], dense, x["forecast"])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_key, key, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_value, value, atol=1e-4, rtol=1e-5)
    # What is left out of a strict cache is zero to the bit, and nothing else is.
    assert present_key.ne(0).any(-1).any(1).equal(kept)


def added(y: Tensor, x: dict[str, Tensor], factor: float) -> Tensor:
    """What follows a unit."""
    return factor * (F.rms_norm(y, (D,), x["post_norm"], EPSILON) if "post_norm" in x else y)


def operators(function: ir.Function) -> set[str]:
    return {node.op_type for node in ir.traversal.RecursiveGraphIterator(function)}


def test_bodies_hold_no_node_for_what_is_absent():
    for build in (mlp, attention, moe):
        plain, scaled = build(), build(features=Features(scaled=True))
        assert "RMSNormalization" not in operators(plain)
        assert "RMSNormalization" in operators(build(["post_norm"]))
        assert "Mul" in operators(scaled)
        assert len(list(scaled)) - len(list(plain)) == 3  # the factor, its type, the product


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

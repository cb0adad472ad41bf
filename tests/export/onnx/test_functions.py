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

from ir_convert.export.onnx.functions import (
    DOMAIN,
    OPSET,
    ROUTING,
    VERSION,
    attention,
    mlp,
)

PROPERTY = settings(max_examples=60, deadline=None)
D, FFN, HEAD, EPSILON = 12, 20, 8, 1e-5

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


def run(function: ir.Function, values: dict[str, Tensor], **attributes: float) -> list[Tensor]:
    """Runs a model that holds nothing but one call of the function."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: VERSION}, name="call")
    builder = GraphBuilder(graph)
    inputs = {
        name: builder.input(
            name, ir.DataType.BOOL if value.dtype == torch.bool else ir.DataType.FLOAT, [None] * value.ndim
        )
        for name, value in values.items()
    }
    outputs = [ir.Value(name=f"out{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in range(len(function.outputs))]
    builder.call(function, *(inputs.get(value.name) for value in function.inputs), _outputs=outputs, **attributes)
    graph.outputs.extend(outputs)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10, functions=[function]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()})
    return [torch.from_numpy(result) for result in results]


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    kind=execute_masks,
    biases=st.sets(st.sampled_from(["gate_bias", "up_bias", "down_bias"])),
    routed=st.booleans(),
)
def test_mlp(seed, batch, length, kind, biases, routed):
    torch.manual_seed(seed)
    shapes = {"gate_weight": (D, FFN), "up_weight": (D, FFN), "down_weight": (FFN, D)}
    shapes |= {name: (D if name == "down_bias" else FFN,) for name in sorted(biases)}
    x = {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"execute": execute_mask(kind, batch, length)} | {name: torch.randn(shape) for name, shape in shapes.items()}

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)

    dense = linear(F.silu(linear(x["h"], "gate")) * linear(x["h"], "up"), "down")
    expected = torch.where(x["execute"][..., None], dense, x["forecast"]) if routed else dense
    (got,) = run(mlp(biases, routed), x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    past=st.integers(0, 5),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    kind=execute_masks,
    optional=st.sets(st.sampled_from(["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"])),
    variant=st.sampled_from(["full", "strict", "dense"]),
)
def test_attention(seed, batch, length, past, groups, kv_heads, kind, optional, variant):
    torch.manual_seed(seed)
    heads, total = groups * kv_heads, past + length
    q, kv = heads * HEAD, kv_heads * HEAD
    shapes = {"q_weight": (D, q), "k_weight": (D, kv), "v_weight": (D, kv), "o_weight": (q, D)}
    shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (D,), "q_norm": (HEAD,), "k_norm": (HEAD,)}
    x = {name: torch.randn(shape) for name, shape in shapes.items() if name.endswith("_weight") or name in optional}
    angles = torch.rand(batch, length, HEAD // 2) * 6
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
        y = (x["h"] @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)).view(batch, length, count, HEAD).transpose(1, 2)
        if f"{name}_norm" in x:
            y = F.rms_norm(y, (HEAD,), x[f"{name}_norm"], EPSILON)
        if not rotate:
            return y
        cos, sin = (part.repeat(1, 1, 2).unsqueeze(1) for part in (x["cos"], x["sin"]))
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat((-b, a), -1) * sin

    key = torch.cat((x["past_key"], project("k", kv_heads, True)), 2) * kept[:, None, :, None]
    value = torch.cat((x["past_value"], project("v", kv_heads, False)), 2) * kept[:, None, :, None]
    scores = project("q", heads, True) @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~(x["mask"] & kept[:, None])[:, None], -torch.inf).softmax(-1)
    y = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, length, q)
    dense = y @ x["o_weight"] + x.get("o_bias", 0)

    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.3, "epsilon": EPSILON}
    function = attention(optional, variant != "dense", "strict" if variant == "strict" else "full")
    output, present_key, present_value = run(function, x, **attributes)
    expected = dense if variant == "dense" else torch.where(x["execute"][..., None], dense, x["forecast"])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_key, key, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_value, value, atol=1e-4, rtol=1e-5)
    # What is left out of a strict cache is zero to the bit, and nothing else is.
    assert present_key.ne(0).any(-1).any(1).equal(kept)


def test_signatures_are_stable():
    """A native library registers kernels for these; changing one breaks files that are out in the world."""
    mlp_inputs = "h forecast execute gate_weight up_weight down_weight gate_bias up_bias down_bias"
    attention_inputs = (
        "h forecast execute cos sin mask past_key past_value q_weight k_weight v_weight o_weight "
        "q_bias k_bias v_bias o_bias q_norm k_norm"
    )
    attention_outputs = ["output", "present_key", "present_value"]
    norms = ["q_norm", "k_norm"]
    for function, name, inputs, outputs in (
        (mlp(), "RoutedMLP", mlp_inputs, ["output"]),
        (mlp(routed=False), "DenseMLP", mlp_inputs, ["output"]),
        (attention(norms), "RoutedAttention", attention_inputs, attention_outputs),
        (attention(norms, kv_cache="strict"), "RoutedAttentionStrict", attention_inputs, attention_outputs),
        (attention(norms, routed=False), "DenseAttention", attention_inputs, attention_outputs),
    ):
        routed = name.startswith("Routed")
        assert (function.domain, function.name) == ("ir", name)
        assert [value.name for value in function.inputs] == [n for n in inputs.split() if routed or n not in ROUTING]
        assert [value.name for value in function.outputs] == outputs
        attributes = [] if name.endswith("MLP") else ["num_heads", "kv_num_heads", "scale", "epsilon"]
        assert list(function.attributes) == attributes
        assert ("where execute, forecast elsewhere" in (function.doc_string or "")) == routed

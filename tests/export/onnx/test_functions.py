"""The routed units on their own, against plain torch: any execute mask, any padding, every optional input."""

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
    ATTENTION_INPUTS,
    DOMAIN,
    MLP_INPUTS,
    OPSET,
    VERSION,
    routed_attention,
    routed_mlp,
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


def run(function: ir.Function, names: tuple[str, ...], values: dict[str, Tensor], **attributes: float) -> list[Tensor]:
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
    builder.call(function, *map(inputs.get, names), _outputs=outputs, **attributes)
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
)
def test_mlp(seed, batch, length, kind, biases):
    torch.manual_seed(seed)
    shapes = {"gate_weight": (D, FFN), "up_weight": (D, FFN), "down_weight": (FFN, D)}
    shapes |= {name: (D if name == "down_bias" else FFN,) for name in sorted(biases)}
    x = {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"execute": execute_mask(kind, batch, length)} | {name: torch.randn(shape) for name, shape in shapes.items()}

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)

    dense = linear(F.silu(linear(x["h"], "gate")) * linear(x["h"], "up"), "down")
    (got,) = run(routed_mlp(biases), MLP_INPUTS, x)
    torch.testing.assert_close(got, torch.where(x["execute"][..., None], dense, x["forecast"]), atol=1e-4, rtol=1e-5)


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
)
def test_attention(seed, batch, length, past, groups, kv_heads, kind, optional):
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
    # An executed token sees itself; one that is not may see nothing at all, as padding does.
    x["mask"] |= (torch.arange(total) == past + torch.arange(length)[:, None]) & x["execute"][..., None]

    def project(name: str, count: int, rotate: bool) -> Tensor:
        y = (x["h"] @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)).view(batch, length, count, HEAD).transpose(1, 2)
        if f"{name}_norm" in x:
            y = F.rms_norm(y, (HEAD,), x[f"{name}_norm"], EPSILON)
        if not rotate:
            return y
        cos, sin = (part.repeat(1, 1, 2).unsqueeze(1) for part in (x["cos"], x["sin"]))
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat((-b, a), -1) * sin

    key = torch.cat((x["past_key"], project("k", kv_heads, True)), 2)
    value = torch.cat((x["past_value"], project("v", kv_heads, False)), 2)
    scores = project("q", heads, True) @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~x["mask"][:, None], -torch.inf).softmax(-1)
    y = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, length, q)
    dense = y @ x["o_weight"] + x.get("o_bias", 0)

    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.3, "epsilon": EPSILON}
    output, present_key, present_value = run(routed_attention(optional), ATTENTION_INPUTS, x, **attributes)
    expected = torch.where(x["execute"][..., None], dense, x["forecast"])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_key, key, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_value, value, atol=1e-4, rtol=1e-5)


def test_signatures_are_stable():
    """A native library registers kernels for these; changing one breaks files that are out in the world."""
    mlp, attention = routed_mlp(), routed_attention(["q_norm", "k_norm"])
    assert (mlp.domain, mlp.name) == ("ir", "RoutedMLP")
    assert [value.name for value in mlp.inputs] == (
        ["h", "forecast", "execute", "gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias"]
    )
    assert [value.name for value in mlp.outputs] == ["output"]
    assert (attention.domain, attention.name) == ("ir", "RoutedAttention")
    assert [value.name for value in attention.inputs] == (
        [
            "h",
            "forecast",
            "execute",
            "cos",
            "sin",
            "mask",
            "past_key",
            "past_value",
            "q_weight",
            "k_weight",
            "v_weight",
            "o_weight",
            "q_bias",
            "k_bias",
            "v_bias",
            "o_bias",
            "q_norm",
            "k_norm",
        ]
    )
    assert [value.name for value in attention.outputs] == ["output", "present_key", "present_value"]
    assert list(attention.attributes) == ["num_heads", "kv_num_heads", "scale", "epsilon"]
    for function in (mlp, attention):
        assert "where execute, forecast elsewhere" in (function.doc_string or "")

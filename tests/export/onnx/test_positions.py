"""Which token sees which, before any unit runs."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder

from ir_convert.export.onnx.functions import OPSET
from ir_convert.export.onnx.positions import attention_masks

WINDOWS = (None, 1, 3)


def build() -> ort.InferenceSession:
    """A graph that holds nothing but the masks."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="masks")
    builder = GraphBuilder(graph)
    real = builder.input("real", ir.DataType.BOOL, ["batch", "total"])
    places = builder.input("places", ir.DataType.INT64, ["new"])
    masks = attention_masks(builder.op, real, places, set(WINDOWS))
    for window in WINDOWS:
        masks[window].name, masks[window].type = f"mask.{window}", ir.TensorType(ir.DataType.BOOL)
        graph.outputs.append(masks[window])
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = build()


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 3), past=st.integers(0, 5), new=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_masks(batch, past, new, seed):
    """Real tokens see the real ones up to themselves, inside their window; padding sees itself, so that no row is empty."""
    total = past + new
    real = torch.rand(batch, total, generator=torch.Generator().manual_seed(seed)) < 0.6
    keys = torch.arange(total)
    queries = keys[past:, None]
    got = SESSION.run(None, {"real": real.numpy(), "places": np.arange(past, total)})
    for window, mask in zip(WINDOWS, got, strict=True):
        counts = real.long().cumsum(1)
        near = counts[:, None] > counts[:, past:, None] - (window or total + 1)
        seen = (keys <= queries) & near & real[:, None]
        np.testing.assert_array_equal(mask, (seen | (keys == queries)).numpy())
        assert mask.any(axis=-1).all()

"""Quantised models as a whole: the head in int8, and an int4 file beside what its weights come back as."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_routing, save_random
from onnxscript import GraphBuilder
from stream_reference import StreamReference
from variants import give_sizes

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4, dequantised
from ir_convert.export.onnx.int8 import ATTRIBUTES, quantise
from ir_convert.families import experts_of
from ir_convert.routing import Routing
from ir_convert.runtime import OnnxModel
from ir_convert.units import RoutedUnit


class Rounded:
    """Quantises and dequantises, as the exported file's kernels see weights."""

    def __init__(self, int4: Int4) -> None:
        self.int4 = int4

    def __call__(self, weight: torch.Tensor, name: str | None) -> torch.Tensor:
        return dequantised(weight, self.int4)

    def facts(self) -> dict[str, object]:
        return self.int4.facts()


def rounded_decisions(routing: Routing) -> Routing:
    """Forecasters and routers as an int4 file holds them: always rounded to the nearest, whatever the units' method."""

    def rounded(unit: RoutedUnit) -> RoutedUnit:
        down, up, hidden = (
            dequantised(weight, Int4()) for weight in (unit.forecaster.down, unit.forecaster.up, unit.router.hidden)
        )
        return RoutedUnit(replace(unit.forecaster, down=down, up=up), replace(unit.router, hidden=hidden))

    return replace(routing, units={key: rounded(unit) for key, unit in routing.units.items()})


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 100), rows=st.integers(0, 5), seed=st.integers(0, 2**16))
def test_int8(outputs, inputs, rows, seed):
    """Off by half a step at most; and the kernel computes with just these weights, activations rounded to int8 as well."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    weight[0, : inputs // 2] = 0
    packed, scales = quantise(weight)
    back = ((packed.float() - 128) * scales.unsqueeze(-1)).flatten(1)[:, :inputs]
    step = scales.repeat_interleave(32, 1)[:, :inputs]
    assert ((back - weight).abs() <= step * 0.5001).all()

    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, "com.microsoft": 1}, name="head")
    builder = GraphBuilder(graph)
    x = builder.input("x", ir.DataType.FLOAT, ["rows", inputs])
    parts = [builder.initializer(ir.tensor(part), name) for name, part in (("w", packed), ("s", scales))]
    y = builder.op.MatMulNBits(x, *parts, N=outputs, K=inputs, **ATTRIBUTES, _domain="com.microsoft")
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=11)).SerializeToString()
    feed = torch.randn(rows, inputs)
    (got,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": feed.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), feed @ back.T, atol=0.02 * inputs**0.5, rtol=0.02)


@pytest.mark.parametrize("method", ["rtn", "k_quant"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "granite", "qwen3_moe", "mixtral", "olmoe"]
)
def test_int4_model(name, method, tmp_path):
    """Against torch on the dequantised weights: the same decisions, logits but for the rounding of activations."""
    save_random(name, tmp_path / "base")
    checkpoint, int4 = Checkpoint.open(str(tmp_path / "base")), Int4(method, accuracy_level=1)
    routing = random_routing(checkpoint)
    (tmp_path / "onnx").mkdir()
    write(checkpoint, routing, tmp_path / "onnx", "m.onnx", int4=int4)
    onnx.checker.check_model(tmp_path / "onnx" / "m.onnx", full_check=True)
    proto = onnx.load(tmp_path / "onnx" / "m.onnx", load_external_data=False)
    called = {node.op_type: node.domain for node in proto.graph.node if node.domain.startswith("ir")}
    mlp = "RoutedMLP" if experts_of(checkpoint.config) is None else "RoutedMoE"
    assert called == dict.fromkeys(("Decide", "RoutedAttention", mlp), "ir.int4")

    rounded = checkpoint.quantised(Rounded(int4))
    reference = StreamReference(rounded, rounded_decisions(routing))
    model = OnnxModel.load(tmp_path / "onnx", threads=1)
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 131, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    for threshold in (-np.inf, 0.0, np.inf):
        model.threshold = threshold
        expected = reference(ids, mask, threshold)
        assert expected.margin > 1e-5
        logits = torch.from_numpy(model.logits(ids.numpy(), mask.numpy()))
        real = mask.bool()
        off = (logits - expected.logits)[real].std()
        assert off < 0.02 * expected.logits[real].std()  # the head alone rounds activations to int8
        best, second = expected.logits[real].topk(2).values.unbind(-1)
        clear = best - second > 8 * off
        assert clear.float().mean() > 0.25
        assert logits.argmax(-1)[real][clear].equal(expected.logits.argmax(-1)[real][clear])


def test_int4_forecasters_of_any_rank(tmp_path):
    """Rank 0 forecasts through a rank of zeros."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    routing = random_routing(checkpoint)
    give_sizes(routing)
    assert routing.units[0, "attention"].forecaster.rank == 0
    ids, found = np.random.default_rng(0).integers(3, 131, (2, 9)), []
    for name, int4 in (("whole", None), ("int4", Int4(accuracy_level=1))):
        (tmp_path / name).mkdir()
        write(checkpoint, routing, tmp_path / name, "m.onnx", int4=int4)
        found.append(OnnxModel.load(tmp_path / name, threads=1, threshold=np.inf).logits(ids))
    assert np.corrcoef(*map(np.ravel, found))[0, 1] > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_may_round_activations(dtype, tmp_path):
    """Else the head's kernel is a hundred times slower."""
    save_random("llama", tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write(checkpoint, random_routing(checkpoint), tmp_path, "m.onnx", dtype=dtype, int4=Int4())
    model, levels = ir.load(tmp_path / "m.onnx"), {}
    for part in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(part):
            if node.op_type == "MatMulNBits":
                levels.setdefault(part.name, set()).add(node.attributes.get_int("accuracy_level", 0))
    decisions = ["Decide"] * (dtype == torch.float32)
    assert levels == {name: {4} for name in ("RoutedAttention", "RoutedMLP", "ir_decoder", *decisions)}


def test_int8_refuses_what_is_not_finite():
    with pytest.raises(UserError, match=r"tensor 'lm_head\.weight' holds values that are not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), "lm_head.weight")

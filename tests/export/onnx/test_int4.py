"""int4 weights: the contract of MatMulNBits, what its kernel computes, and how far off each method is."""

import logging
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch.nn.functional import pad

from ir_convert.choices import INT4_METHODS
from ir_convert.errors import UserError
from ir_convert.export.onnx import int4 as module
from ir_convert.export.onnx import int4_methods
from ir_convert.export.onnx.int4 import Int4, dequantised, int4_tensors, quantise

FLOATS = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Weights of awkward shapes and scales, with blocks that are zero, constant, or all of one sign."""
    outputs, inputs = draw(st.integers(1, 7)), draw(st.integers(1, 130))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(outputs, inputs, generator=generator) * draw(st.sampled_from([1e-5, 0.02, 1.0, 300.0]))
    for start in range(0, inputs, 32):
        kind = draw(st.sampled_from(["normal", "normal", "zero", "constant", "positive", "outlier"]))
        row, columns = draw(st.integers(0, outputs - 1)), slice(start, start + 32)
        if kind == "zero":
            weight[row, columns] = 0
        elif kind == "constant":
            weight[row, columns] = weight[row, start].item()
        elif kind == "positive":
            weight[row, columns] = weight[row, columns].abs() + 3 * weight.abs().max()
        elif kind == "outlier":
            weight[row, start] *= 50
    return weight


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` -> ``[out, blocks, 32]``, filled up with zeros."""
    return pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))


def session(weight: torch.Tensor, int4: Int4, dtype: torch.dtype = torch.float32) -> ort.InferenceSession:
    """A model of one MatMulNBits, its tensors as ``int4_tensors`` writes them."""
    tensors = int4_tensors("w", tuple(weight.shape), lambda: weight, int4, dtype)
    initializers = [ir.to_proto(tensor) for tensor in tensors.values()]
    node = make_node(
        "MatMulNBits",
        ["x", *(tensor.name for tensor in tensors.values())],
        ["y"],
        domain="com.microsoft",
        **int4.attributes(*weight.shape),
    )
    ends = [make_tensor_value_info(name, FLOATS[dtype], ["m", None]) for name in ("x", "y")]
    opsets = [make_opsetid("", 23), make_opsetid("com.microsoft", 1)]
    model = make_model(make_graph([node], "g", ends[:1], ends[1:], initializers), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("method", INT4_METHODS)
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_shapes_and_bytes_are_those_announced(method, weight):
    int4 = Int4(method)
    parts = quantise(weight, int4).parts()
    assert {name: tuple(part.shape) for name, part in parts.items()} == int4.shapes(*weight.shape)
    assert sum(part.nbytes for part in parts.values()) == int4.size(*weight.shape, itemsize=4)


@pytest.mark.parametrize("method", INT4_METHODS)
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_kernel_computes_with_the_dequantised_weight(method, weight):
    int4 = Int4(method, accuracy_level=1)
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    x[2] = 0
    y = torch.from_numpy(session(weight, int4).run(None, {"x": x.numpy()})[0])
    w = dequantised(weight, int4)
    # Against the sizes of what is added up: products of both signs may cancel.
    error = (y - x @ w.T).abs() / (x.abs() @ w.abs().T).clamp(min=1e-30)
    assert error.max() < 1e-4
    assert torch.equal(y[2], torch.zeros_like(y[2]))


@pytest.mark.parametrize("method", INT4_METHODS)
def test_kernel_takes_no_rows(method):
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    y = session(weight, Int4(method)).run(None, {"x": np.zeros((0, 70), np.float32)})[0]
    assert y.shape == (0, 6)


@pytest.mark.parametrize("method", ["rtn", "rtn_asym", "k_quant"])
def test_default_level_is_close(method):
    """Activations rounded to int8 add little to what int4 itself costs."""
    assert Int4(method).attributes(64, 256)["accuracy_level"] == 4
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(40, 256, generator=generator)
    exact, quantised = x @ weight.T, x @ dequantised(weight, Int4(method)).T
    y = torch.from_numpy(session(weight, Int4(method)).run(None, {"x": x.numpy()})[0])
    of_the_level, of_int4 = ((a - b).norm() / exact.norm() for a, b in ((y, quantised), (quantised, exact)))
    assert of_the_level < 0.02 < of_int4


@pytest.mark.parametrize("method", INT4_METHODS)
def test_float16(method):
    """Scales are rounded to 11 bits."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 96, generator=generator) * 0.05, torch.randn(3, 96, generator=generator).half()
    y = session(weight, Int4(method, accuracy_level=1), torch.float16).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(
        torch.from_numpy(y).float(), x.float() @ dequantised(weight, Int4(method)).T, rtol=1e-2, atol=1e-2
    )


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_rtn_is_off_by_half_a_step(weight):
    """By a whole one only at the end that the 16 steps -8 ... 7 lack, opposite the block's largest weight."""
    blocks, packed = blocks_of(weight), quantise(weight, Int4())
    error = blocks_of(weight - packed.dequantised()).abs()
    step = packed.scales.unsqueeze(-1)
    cut = blocks * step.sign() > 7.5 * step.abs()
    slack = 1e-5 * blocks.abs().amax(-1, keepdim=True)
    assert (error <= torch.where(cut, 1.0, 0.5) * step.abs() + slack).all()
    assert torch.allclose(step.abs().squeeze(-1) * 8, blocks.abs().amax(-1), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_asymmetric_rtn_is_off_by_a_step_at_most(weight):
    packed = quantise(weight, Int4("rtn_asym"))
    error = blocks_of(weight - packed.dequantised()).abs().amax(-1)
    blocks = blocks_of(weight)
    step = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) / 15
    assert (error <= 1.001 * step).all()


@pytest.mark.parametrize("method", ["hqq", "k_quant"])
@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_no_block_is_lost(method, weight):
    """onnxruntime's own code gives 0 for a block of equal weights, and a tenth of one far from 0."""
    error, plain = (blocks_of(weight - dequantised(weight, Int4(name))).abs().amax(-1) for name in (method, "rtn_asym"))
    assert (error <= int4_methods.WORSE * plain + 1e-5 * blocks_of(weight).abs().amax(-1)).all()


def test_what_onnxruntime_alone_would_lose():
    """The guard is there for a reason; should this fail, onnxruntime has learned it."""
    weight = torch.linspace(1.0, 1.1, 32)[None]
    q, scale, zero = (torch.from_numpy(part) for part in int4_methods._onnxruntime().k_quant(weight.numpy(), 4, 32))
    assert ((q - zero.float()) * scale - weight).abs().max() > 0.5
    assert (dequantised(weight, Int4("k_quant")) - weight).abs().max() < 0.08


def test_methods_by_their_error():
    """On weights like a model's: what each method's fit is worth, and that none is another under a new name."""
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    errors = {
        method: float((dequantised(weight, Int4(method)) - weight).norm() / weight.norm()) for method in INT4_METHODS
    }
    assert errors["hqq"] < errors["rtn_asym"] < errors["rtn"] < 0.09
    assert errors["rtn_asym"] < errors["k_quant"] < errors["rtn"]
    assert errors["hqq"] > 0.07


@pytest.mark.parametrize("method", INT4_METHODS)
def test_zero_stays_zero(method):
    weight = torch.zeros(3, 40)
    assert torch.equal(dequantised(weight, Int4(method)), weight)


@pytest.mark.parametrize("method", ["rtn", "rtn_asym", "k_quant"])
def test_rows_do_not_depend_on_each_other(method, monkeypatch):
    """So chunks change nothing, and projections packed in one tensor can be taken apart before or after."""
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    whole = quantise(weight, Int4(method))
    monkeypatch.setattr(module, "CHUNK", 2 * 70)
    for name, part in quantise(weight, Int4(method)).parts().items():
        assert torch.equal(part, whole.parts()[name])
    assert torch.equal(dequantised(weight[4:], Int4(method)), whole.dequantised()[4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_any_precision(dtype):
    weight = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(dequantised(weight, Int4()), dequantised(weight.float(), Int4()))
    assert dequantised(weight, Int4()).dtype == torch.float32


@pytest.mark.parametrize("method", INT4_METHODS)
def test_written_parts_are_quantised_once(method):
    reads = []
    weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))

    def read():
        reads.append(1)
        return weight

    int4 = Int4(method)
    tensors = int4_tensors("w", (4, 70), read, int4, torch.float16)
    assert not reads
    expected = quantise(weight, int4).parts()
    for part, tensor in tensors.items():
        dtype = expected[part].dtype if expected[part].dtype == torch.uint8 else torch.float16
        np.testing.assert_array_equal(tensor.numpy(), expected[part].to(dtype).numpy())
    assert len(reads) == 1
    first = next(iter(tensors.values()))
    np.testing.assert_array_equal(first.numpy(), expected["weight"].numpy())
    assert len(reads) == 2
    assert [tensor.name for tensor in tensors.values()] == ["w.int4", "w.scales", "w.zero_points"][: len(expected)]


def test_bad_weights_end_in_one_line():
    weight = torch.ones(2, 32)
    weight[1, 3] = torch.nan
    for read, message in ((weight, "'w' holds values that are not finite"), (weight[:1], r"'w' has shape \[1, 32\]")):
        tensors = int4_tensors("w", (2, 32), lambda read=read: read, Int4(), torch.float32)
        with pytest.raises(UserError, match=message):
            tensors["scales"].numpy()


def test_unknown_method():
    with pytest.raises(UserError, match="--int4-method 'awq' is not known: give rtn or rtn_asym or hqq or k_quant"):
        Int4("awq")


def test_logging_stays_the_callers():
    """onnxruntime's quantiser sets up the root logger when it is imported."""
    program = (
        "import logging, torch; from ir_convert.export.onnx.int4 import Int4, dequantised;"
        "dequantised(torch.ones(1, 32), Int4('hqq')); dequantised(torch.ones(1, 32), Int4('k_quant'));"
        "root = logging.getLogger(); print(root.handlers, root.level)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {logging.WARNING}"

"""The native kernels against float64 and against the functions that they replace, in every mode and awkward shapes."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_random import EXECUTES, quantised, random_attention, random_decide, random_mlp
from op_session import Session
from op_units import Unit, rms

from ir_convert.choices import INT4_METHODS
from ir_convert.export.onnx.int4 import Int4
from ir_convert.export.onnx.ops import supported

LENGTHS = (1, 3, 17, 129, 431)
HALF, SINGLE = np.float16, np.float32
PROPERTY = settings(max_examples=60, deadline=None)


def run(unit: Unit, library, constant: bool = False, threads: int = 1) -> list[np.ndarray]:
    return Session(unit, library, constant, threads).run(unit)


def same(got: list[np.ndarray], other: list[np.ndarray], tolerance: float) -> None:
    for a, b in zip(got, other, strict=True):
        if a.dtype == np.bool_:
            np.testing.assert_array_equal(a, b)
            continue
        np.testing.assert_allclose(a, b, atol=tolerance * np.nanmax(np.abs(b), initial=1), rtol=0)


def check(unit: Unit, library, constant: bool = True, threads: int = 1) -> None:
    """Holds the kernel against float64, and against the function's body in ONNX Runtime's own operators."""
    got = run(unit, library, constant, threads)
    unit.check(got)
    body = run(unit, None, constant)
    if unit.function == "Decide":
        got[0], body[0] = unit.read(got[0]), unit.read(body[0])
    if unit.int4 is None:
        same(got, body, 3e-5 if unit.dtype == SINGLE else 6e-3)
        return
    # ONNX Runtime leaves activations as they are where they are float16, or zero points fractional.
    rounds = unit.dtype == SINGLE and unit.int4.method != "hqq"
    for a, b in zip(got, body, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))  # unused slots of caches
        a, b = np.nan_to_num(a.astype(SINGLE)), np.nan_to_num(b.astype(SINGLE))
        assert rms(a - b) <= (unit.int4_tolerance(a.size) if rounds else 1e-2) * max(rms(b), 1e-3)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("execute", EXECUTES)
@pytest.mark.parametrize("rank", [0, 12])
def test_decide(library, rank, execute, length, dtype):
    check(random_decide(np.random.default_rng(length), 3, length, 80, rank, 8, execute, dtype), library)


@pytest.mark.parametrize("length", [*LENGTHS, 2])
@pytest.mark.parametrize("execute", EXECUTES)
@pytest.mark.parametrize(("width", "rank"), [(64, 32), (80, 12), (1000, 300)])
def test_int4_decide(library, width, rank, execute, length):
    batch = 1 + length % 3 if length > 2 else 1
    check(random_decide(np.random.default_rng(length), batch, length, width, rank, 8, execute, int4=Int4()), library)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("execute", [*EXECUTES, None])
def test_mlp(library, length, execute, dtype):
    rng = np.random.default_rng(length)
    check(random_mlp(rng, 3, length, 80, 176, execute, dtype=dtype), library)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("length", [1, 2, 5, 17, 431])
@pytest.mark.parametrize("execute", [*EXECUTES, None])
@pytest.mark.parametrize(("width", "hidden"), [(80, 176), (1000, 300)])
def test_int4_mlp(library, width, hidden, execute, length, dtype):
    batch = 1 + length % 3 if length > 2 else 1
    unit = random_mlp(np.random.default_rng(length), batch, length, width, hidden, execute, dtype=dtype)
    check(quantised(unit, Int4()), library)


@pytest.mark.parametrize("method", INT4_METHODS)
@pytest.mark.parametrize("variant", ["routed", "strict", "dense"])
@pytest.mark.parametrize("spare", [None, 7])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_int4_attention(library, length, spare, variant, method):
    execute = None if variant == "dense" else "random"
    rng = np.random.default_rng(length)
    unit = random_attention(rng, 3, length, 33, spare, (4, 2), 48, 80, execute, strict=variant == "strict")
    check(quantised(unit, Int4(method)), library)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention(library, length, head_dim, dtype):
    rng = np.random.default_rng(length + head_dim)
    batch, execute = 1 + length % 3, EXECUTES[(length + head_dim) // 16 % 5]
    spare = None if head_dim % 5 == 0 else 3
    check(random_attention(rng, batch, length, 5, spare, (4, 2), head_dim, execute=execute, dtype=dtype), library)


@pytest.mark.parametrize("variant", ["routed", "strict", "dense"])
@pytest.mark.parametrize("mask", ["left", "right", "window", "holes"])
@pytest.mark.parametrize("spare", [None, 7])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_masks_and_caches(library, length, spare, mask, variant):
    rng = np.random.default_rng(length)
    execute = None if variant == "dense" else "random"
    unit = random_attention(rng, 3, length, 33, spare, execute=execute, strict=variant == "strict", mask=mask)
    check(unit, library)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (12, 4), (8, 2), (8, 1), (12, 2), (40, 1)])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_shared_keys(library, heads, length):
    check(random_attention(np.random.default_rng(7), 2, length, 70, 2, heads, 32, execute="all"), library)


@pytest.mark.parametrize("past", [511, 4096])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(("batch", "heads"), [(1, (4, 2)), (4, (4, 2)), (2, (3, 1))])
def test_long_caches(library, batch, heads, length, past):
    unit = random_attention(np.random.default_rng(past), batch, length, past, 10, heads, 64, execute="all")
    check(unit, library, threads=2)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1)])
@pytest.mark.parametrize("length", [1, 40])
def test_what_is_not_a_number_stays_so(library, length, heads, dtype):
    rng, place = np.random.default_rng(length), length // 2
    attention = random_attention(rng, 2, length, 9, 3, heads, execute="all", dtype=dtype)
    mlp = random_mlp(rng, 2, length, execute="all", dtype=dtype)
    for unit in (attention, mlp, quantised(attention, Int4()), quantised(mlp, Int4("rtn_asym"))):
        unit.inputs["h"][0, place, 0] = np.nan
        output = run(unit, library)[0]
        assert np.isnan(output[0, place]).all()
        assert not np.isnan(output[1]).any()


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 40),
    width=st.integers(1, 70),
    rank=st.integers(0, 40),
    hidden=st.integers(1, 40),
    execute=st.sampled_from(EXECUTES),
    kind=st.sampled_from([SINGLE, HALF, "int4"]),
    constant=st.booleans(),
)
def test_any_decide(library, seed, batch, length, width, rank, hidden, execute, kind, constant):
    int4 = Int4() if kind == "int4" else None
    dtype, rank = (SINGLE, max(rank, 1)) if int4 else (kind, rank)
    unit = random_decide(np.random.default_rng(seed), batch, length, width, rank, hidden, execute, dtype, int4)
    unit.check(run(unit, library, constant))


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 40),
    width=st.integers(1, 70),
    hidden=st.integers(1, 70),
    execute=st.sampled_from([*EXECUTES, None]),
    optional=st.sets(st.sampled_from(["gate_bias", "up_bias", "down_bias", "post_norm"])),
    activation=st.sampled_from(["silu", "gelu_pytorch_tanh"]),
    factor=st.sampled_from([1.0, 0.4]),
    dtype=st.sampled_from([SINGLE, HALF]),
    method=st.sampled_from([None, *INT4_METHODS]),
    constant=st.booleans(),
)
def test_any_mlp(
    library, seed, batch, length, width, hidden, execute, optional, activation, factor, dtype, method, constant
):
    attributes = {"activation": activation, "residual_multiplier": factor}
    rng = np.random.default_rng(seed)
    unit = random_mlp(rng, batch, length, width, hidden, execute, tuple(sorted(optional)), dtype, **attributes)
    if method:
        unit = quantised(unit, Int4(method))
    unit.check(run(unit, library, constant))


@PROPERTY
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 30),
    past=st.integers(0, 120),
    spare=st.sampled_from([None, 0, 3]),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 8),
    half=st.integers(1, 12),
    execute=st.sampled_from([*EXECUTES, None]),
    strict=st.booleans(),
    mask=st.sampled_from(["left", "right", "window", "holes"]),
    optional=st.sets(st.sampled_from(["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "post_norm"])),
    whole_norms=st.booleans(),
    rotary=st.sampled_from([0, 2]),
    softcap=st.sampled_from([0.0, 1.5, 30.0]),
    factor=st.sampled_from([1.0, 0.4]),
    dtype=st.sampled_from([SINGLE, HALF]),
    method=st.sampled_from([None, *INT4_METHODS]),
    constant=st.booleans(),
)
def test_any_attention(
    library, seed, batch, length, past, spare, kv_heads, shared, half, execute, strict, mask, optional, whole_norms,
    rotary, softcap, factor, dtype, method, constant,
):  # fmt: skip
    attributes = {"rotary_dim": rotary, "softcap": softcap, "residual_multiplier": factor}
    unit = random_attention(
        np.random.default_rng(seed), batch, length, past, spare, (kv_heads * shared, kv_heads), 2 * half, 24, execute,
        strict, mask, tuple(sorted(optional)), whole_norms, dtype, **attributes,
    )  # fmt: skip
    if method:
        unit = quantised(unit, Int4(method))
    unit.check(run(unit, library, constant))


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_change_nothing(library, threads):
    rng = np.random.default_rng(0)
    for unit in (
        random_decide(rng, 2, 200),
        random_decide(rng, 2, 200, int4=Int4()),
        random_mlp(rng, 2, 200),
        quantised(random_mlp(rng, 2, 200), Int4()),
        random_attention(rng, 2, 200, 30, 0),
        quantised(random_attention(rng, 2, 200, 30, 0), Int4()),
    ):
        for one, many in zip(run(unit, library, True), run(unit, library, True, threads), strict=True):
            np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.DOUBLE])
def test_unsupported_type(library, dtype):
    """ONNX Runtime refuses the model: by its table of the types that the library has, or where another provider has the type, for
    want of a kernel on this one."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    unit = random_mlp(np.random.default_rng(0), 1, 2)
    elsewhere = any(kind == dtype.name.lower() for *_, kind in supported(library))
    said = (
        r"Could not find an implementation for RoutedMLP"
        if elsewhere
        else rf"tensor\({dtype.name.lower()}\).*RoutedMLP"
    )
    with pytest.raises(Exception, match=said):
        ort.InferenceSession(unit.model(dtype=dtype), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("forecast", (2, 3, 63), r"RoutedAttention \(float32\): forecast has shape \[2, 3, 63\], not \[2, 3, 64\]"),
        ("o_weight", (60, 64), r"RoutedAttention \(float32\): o_weight has shape \[60, 64\], not \[64, 64\]"),
        (
            "past_key",
            (2, 2, 4, 16),
            r"RoutedAttention \(float32\): mask \[2, 3, 8\] and past_key \[2, 2, 4, 16\] do not fit",
        ),
        ("h", (6, 64), r"RoutedAttention \(float32\): h has shape \[6, 64\], not 3 dimensions"),
    ],
)
def test_wrong_shape(library, name, shape, message):
    unit = random_attention(np.random.default_rng(0), 2, 3, 5)
    inputs = {**unit.inputs, name: np.zeros(shape, np.float32)}
    if name == "past_key":
        inputs["past_value"] = inputs[name]
    with pytest.raises(Exception, match=message):
        run(Unit(unit.function, inputs, unit.attributes), library)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("up_weight", (64, 2, 16), r"int4 Decide \(float32\): up_weight has shape \[64, 2, 16\], not \[64, 1, 16\]"),
        (
            "hidden_scales",
            (8, 1),
            r"int4 Decide \(float32\): hidden_weight's scales have shape \[8, 1\], .* \[8, 2, 16\]",
        ),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_wrong_shape_of_int4(library, constant, name, shape, message):
    unit = random_decide(np.random.default_rng(0), 2, 3, int4=Int4())
    inputs = {**unit.inputs, name: np.zeros(shape, unit.inputs[name].dtype)}
    with pytest.raises(Exception, match=message):
        run(replace(unit, inputs=inputs), library, constant)

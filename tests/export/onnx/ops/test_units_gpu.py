"""The CUDA kernels on a GPU, in ONNX Runtime, against float64 and against the functions that they replace.

Without a GPU, `.ci/emulate` runs them, but for what ONNX Runtime's own kernels or CUDA graphs would have to compute.
"""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cuda_emulated import BFLOAT16
from op_random import EXECUTES, random_attention, random_decide, random_mlp
from op_session import CUDA, EMULATED, Session
from op_units import Unit

from ir_convert.export.onnx.ops import supported

pytestmark = pytest.mark.gpu
HALF, SINGLE = np.float16, np.float32
DTYPES = [SINGLE, HALF, BFLOAT16]
LENGTHS = (1, 3, 17, 129, 431)
captures = pytest.mark.skipif(EMULATED, reason="the stand-in for CUDA captures no graphs")


@pytest.fixture(scope="module", autouse=True)
def gpu(library):
    leave = pytest.fail if EMULATED else pytest.skip
    if not (EMULATED or torch.cuda.is_available()) or CUDA not in ort.get_available_providers():
        leave("needs an NVIDIA GPU, and onnxruntime-gpu")
    if not any(provider == CUDA for provider, *_ in supported(library)):
        leave("the library was built without CUDA kernels")
    if hasattr(ort, "preload_dlls") and not EMULATED:
        ort.preload_dlls()  # CUDA and cuDNN as torch brought them


def check(unit: Unit, library, functions: bool = False) -> None:
    """Holds the kernel against float64, twice in the same memory; and against the function's body, where that is asked."""
    session = Session(unit, library, constant=True, device="cuda")
    first = session.run(unit)
    unit.check(first)
    for one, other in zip(first, session.run(unit), strict=True):
        assert one.tobytes() == other.tobytes()
    if functions and not EMULATED:
        bodies = Session(unit, None, constant=True, device="cuda").run(unit)
        for one, other in zip(first, bodies, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-2 * np.nanmax(np.abs(other), initial=1), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("rank", "hidden"), [(0, 8), (12, 8), (64, 16), (100, 33)])
def test_decide(library, rank, hidden, length, dtype):
    execute = EXECUTES[(rank + length) % len(EXECUTES)]
    check(random_decide(np.random.default_rng(length), 3, length, 1000, rank, hidden, execute, dtype), library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("execute", [*EXECUTES, None])
def test_mlp(library, execute, length, dtype):
    rng = np.random.default_rng(length)
    optional = ("gate_bias", "up_bias", "down_bias", "post_norm")[: length % 5]
    check(random_mlp(rng, 3, length, 640, 1700, execute, optional, dtype), library, functions=dtype == HALF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [41, 72])
def test_mlp_of_any_width(library, width, dtype):
    for length in (5, 40):
        check(random_mlp(np.random.default_rng(width), 2, length, width, 33, "random", ("post_norm",), dtype), library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("past", [0, 5])
def test_attention(library, past, length, head_dim, dtype):
    rng = np.random.default_rng(length + head_dim)
    batch, execute = 1 + length % 3, EXECUTES[(length + head_dim) // 16 % len(EXECUTES)]
    spare = None if head_dim % 5 == 0 else 3
    unit = random_attention(rng, batch, length, past, spare, (4, 2), head_dim, 320, execute=execute, dtype=dtype)
    check(unit, library, functions=dtype == HALF and past == 5)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("length", [1, 2, 19, 129])
def test_shared_keys(library, heads, length, dtype):
    check(random_attention(np.random.default_rng(7), 2, length, 70, 2, heads, 64, 320, "all", dtype=dtype), library)


@pytest.mark.parametrize("variant", ["routed", "strict", "dense"])
@pytest.mark.parametrize("mask", ["left", "right", "window", "holes"])
@pytest.mark.parametrize("spare", [None, 7])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_masks_and_caches(library, length, spare, mask, variant):
    execute, rng = None if variant == "dense" else "random", np.random.default_rng(length)
    strict = variant == "strict"
    unit = random_attention(rng, 3, length, 33, spare, (4, 2), 64, 128, execute, strict, mask, dtype=HALF)
    check(unit, library)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
@pytest.mark.parametrize("past", [511, 4096])
@pytest.mark.parametrize("length", [1, 4, 200])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_long_caches(library, batch, length, past, dtype):
    unit = random_attention(
        np.random.default_rng(past), batch, length, past, 10, (8, 2), 128, 320, "random", dtype=dtype
    )
    check(unit, library)


def shuffled(unit: Unit, seed: int) -> Unit:
    """The same weights, other tokens and decisions."""
    rng, inputs = np.random.default_rng(seed), dict(unit.inputs)
    inputs["h"] = rng.permutation(inputs["h"].ravel()).reshape(inputs["h"].shape)
    if "execute" in inputs:
        inputs["execute"] = ~inputs["execute"]
    if unit.function == "Decide":
        _, _, score = replace(unit, inputs=inputs).expected()
        inputs["threshold"] = (score + rng.choice([-0.1, 0.1], score.shape)).astype(np.float32)
    return replace(unit, inputs=inputs)


@captures
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 4, 20])
def test_cuda_graph(library, length, dtype):
    """Captured once and replayed with other tokens and decisions: nothing waited for the host, and it decided nothing.

    Of the longest calls, all tokens are computed in a graph.
    """
    rng = np.random.default_rng(length)
    units = [
        random_decide(rng, 2, length, 320, dtype=dtype),
        random_mlp(rng, 2, length, 320, 640, dtype=dtype),
        random_attention(rng, 2, length, 100, 5, (4, 2), 64, 320, dtype=dtype),
        random_attention(rng, 2, length, 100, 5, (4, 2), 64, 320, strict=True, dtype=dtype),
    ]
    for unit in units:
        session = Session(unit, library, constant=True, device="cuda", graph=True)
        for other in (unit, *(shuffled(unit, seed) for seed in range(3))):
            other.check(session.run(other))


@captures
def test_cuda_graph_begun_where_nothing_executes(library):
    """The run before the capture has no products at all, those that are captured have some."""
    unit = random_mlp(np.random.default_rng(0), 1, 40, execute="none", dtype=HALF)
    session = Session(unit, library, constant=True, device="cuda", graph=True)
    for other in (unit, shuffled(unit, 1), unit):
        other.check(session.run(other))


def test_wrong_shape(library):
    unit = random_attention(np.random.default_rng(0), 2, 3, 5, dtype=HALF)
    wrong = Unit(unit.function, {**unit.inputs, "forecast": np.zeros((2, 3, 63), HALF)}, unit.attributes)
    said = r"RoutedAttention \(float16\): forecast has shape \[2, 3, 63\], not \[2, 3, 64\]"
    with pytest.raises(Exception, match=said):
        Session(wrong, library, device="cuda").run(wrong)


def test_unsupported_head(library):
    unit = random_attention(np.random.default_rng(0), 1, 2, 5, None, (2, 1), 20, dtype=HALF)
    with pytest.raises(Exception, match="heads of 20 components"):
        Session(unit, library, device="cuda").run(unit)

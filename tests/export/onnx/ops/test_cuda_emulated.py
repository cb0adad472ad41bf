"""The CUDA kernels on the host, against float64: awkward shapes, every mode, and every order of the threads."""

import os
import shutil
import sys

import numpy as np
import pytest
from cuda_emulated import BFLOAT16, ORDERS, Emulator, compile_units
from op_random import EXECUTES, random_attention, random_decide, random_mlp
from op_units import Unit

HALF, SINGLE = np.float16, np.float32
DTYPES = [SINGLE, HALF, BFLOAT16]
SANITIZED = "IR_CUDA_SANITIZED"  # in the environment of a process that has the sanitizers' runtime: .ci/sanitize


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("the emulation needs g++ on Linux")
    library = tmp_path_factory.mktemp("cuda") / "units.so"
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined") if SANITIZED in os.environ else ()
    compile_units(library, *options)
    return Emulator(library)


def check(emulator: Emulator, unit: Unit, orders: tuple[str, ...] = ("forward", "reversed"), **options) -> None:
    """Holds the kernels against float64, and one order of the threads against the other, bit by bit."""
    first = None
    for order in orders:
        got = emulator.run(unit, order, **options)
        unit.check(got)
        first = first or got
        for one, other in zip(first, got, strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 16, 17])
@pytest.mark.parametrize(("rank", "hidden"), [(0, 8), (1, 1), (12, 8), (40, 16), (9, 33)])
@pytest.mark.parametrize("width", [41, 640])
def test_decide(emulator, width, rank, hidden, length, dtype):
    """Columns that tiles of 8, 16 and 32 hold, and more; with and without a forecaster; from 17 tokens on by cuBLAS."""
    rng = np.random.default_rng(width + rank + length)
    execute = EXECUTES[(rank + length) % len(EXECUTES)]
    check(emulator, random_decide(rng, 1, length, width, rank, hidden, execute, dtype), multiprocessors=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 16, 17])
@pytest.mark.parametrize("execute", [*EXECUTES, None])
def test_mlp(emulator, length, execute, dtype):
    """From 17 tokens on by cuBLAS, which is a plain loop here."""
    rng = np.random.default_rng(length)
    optional = ("gate_bias", "up_bias", "down_bias", "post_norm")[: length % 5]
    activation = "silu" if length % 2 else "gelu_pytorch_tanh"
    unit = random_mlp(
        rng, 1, length, 136, 200, execute, optional, dtype, activation=activation, residual_multiplier=0.4
    )
    check(emulator, unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "width", "hidden"), [(2, 3, 41, 70), (3, 7, 20, 33), (1, 5, 8, 1), (16, 1, 640, 72)]
)
def test_mlp_of_any_width(emulator, batch, length, width, hidden, dtype):
    """Widths that 16 bytes do not divide, that leave tiles half empty, and that are split several times."""
    unit = random_mlp(np.random.default_rng(width), batch, length, width, hidden, "random", ("post_norm",), dtype)
    check(emulator, unit, multiprocessors=40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("length", [1, 3, 17])
@pytest.mark.parametrize("execute", EXECUTES)
def test_attention(emulator, length, head_dim, execute, dtype):
    rng = np.random.default_rng(length + head_dim)
    spare = (None, 0, 9)[(length + head_dim // 16) % 3]
    unit = random_attention(rng, 2, length, 70, spare, (4, 2), head_dim, 40, execute, dtype=dtype)
    check(emulator, unit)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("variant", ["routed", "strict", "dense"])
@pytest.mark.parametrize("mask", ["left", "right", "window", "holes"])
@pytest.mark.parametrize(("length", "spare"), [(2, None), (2, 7), (40, None), (40, 7)])
def test_masks_and_caches(emulator, length, spare, mask, variant, dtype):
    rng = np.random.default_rng(length)
    execute = None if variant == "dense" else "random"
    unit = random_attention(rng, 3, length, 100, spare, (2, 1), 16, 24, execute, variant == "strict", mask, dtype=dtype)
    check(emulator, unit, in_place=mask != "window")


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (9, 3), (7, 1), (8, 1), (20, 2)])
@pytest.mark.parametrize("length", [1, 20])
def test_shared_keys(emulator, heads, length):
    check(emulator, random_attention(np.random.default_rng(7), 2, length, 30, 2, heads, 32, 24, "ragged", dtype=HALF))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (8, 1)])
@pytest.mark.parametrize("length", [1, 40])
def test_what_is_not_a_number_stays_so(emulator, length, heads, dtype):
    rng, place = np.random.default_rng(length), length // 2
    attention = random_attention(rng, 2, length, 9, 3, heads, execute="all", dtype=dtype)
    for unit in (attention, random_mlp(rng, 2, length, execute="all", dtype=dtype)):
        unit.inputs["h"][0, place, 0] = np.nan
        output = emulator.run(unit)[0].astype(SINGLE)
        assert np.isnan(output[0, place]).all()
        assert not np.isnan(output[1]).any()


@pytest.mark.parametrize("past", [0, 300])
@pytest.mark.parametrize("length", [1, 33, 150])
@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_lengths(emulator, length, past, multiprocessors):
    """Several tiles of queries, several blocks of the cache, and a cache split over blocks."""
    unit = random_attention(
        np.random.default_rng(past), 2, length, past, None, (2, 1), 64, 16, "ragged", dtype=BFLOAT16
    )
    check(emulator, unit, multiprocessors=multiprocessors)


OPTIONAL = ("q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "post_norm")


@pytest.mark.parametrize("optional", [OPTIONAL, OPTIONAL[4:5], OPTIONAL[5:6], OPTIONAL[:3]])
@pytest.mark.parametrize("whole_norms", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", [5, 19])
def test_options(emulator, length, strict, whole_norms, optional):
    rng = np.random.default_rng(len(optional))
    attributes = {"rotary_dim": 6, "softcap": 1.5, "residual_multiplier": 0.4}
    unit = random_attention(
        rng, 1, length, 8, 3, (6, 2), 24, 21, "random", strict, "holes", optional, whole_norms, HALF, **attributes
    )
    check(emulator, unit, multiprocessors=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [136, 160, 256])
@pytest.mark.parametrize("length", [1, 40])
def test_large_heads(emulator, length, head_dim, dtype):
    """Longer calls are several tiles of queries."""
    rng = np.random.default_rng(head_dim)
    check(emulator, random_attention(rng, 1, length, 66, 1, (2, 1), head_dim, 16, "random", dtype=dtype))


@pytest.mark.parametrize("length", [1, 18])
def test_shared_memory_that_every_gpu_has(emulator, length):
    """The device that is emulated has as little as any; a call that wants more fails."""
    for head_dim in range(8, 257, 8):
        check(
            emulator,
            random_attention(np.random.default_rng(1), 1, length, 3, None, (8, 1), head_dim, 8, dtype=HALF),
            ("forward",),
        )


def test_too_little_shared_memory(emulator):
    unit = random_decide(np.random.default_rng(0), 1, 1, 8, 0, 25345)
    with pytest.raises(
        RuntimeError, match="layers needs 101380 bytes of shared memory a block, of which the GPU has 101376"
    ):
        emulator.run(unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("execute", EXECUTES)
def test_captured(emulator, execute, dtype):
    """In a CUDA graph nothing waits for the device: many tokens are all computed."""
    rng = np.random.default_rng(5)
    check(emulator, random_mlp(rng, 2, 20, 72, 96, execute, ("post_norm",), dtype), capturing=True)
    check(emulator, random_decide(rng, 2, 20, 72, dtype=dtype), capturing=True)
    for strict in (False, True):
        for batch, length in ((2, 20), (10, 4)):  # in tiles, and each query by itself
            unit = random_attention(
                rng, batch, length, 70, 4, (4, 1), 64, 32, execute, strict, "left", OPTIONAL, strict, dtype
            )
            check(emulator, unit, capturing=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 33])
def test_any_order_of_threads(emulator, length, dtype):
    rng = np.random.default_rng(3)
    check(emulator, random_mlp(rng, 2, length, 72, 96, "random", ("post_norm",), dtype), ORDERS)
    check(emulator, random_decide(rng, 2, length, 72, dtype=dtype), ORDERS)
    check(emulator, random_attention(rng, 2, length, 90, 4, (4, 1), 64, 32, "random", True, dtype=dtype), ORDERS)


def test_unsupported_head(emulator):
    with pytest.raises(RuntimeError, match="heads of 20 components"):
        emulator.run(random_attention(np.random.default_rng(0), 1, 2, 5, None, (2, 1), 20))

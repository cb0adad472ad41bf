"""Weights are written piece by piece: the file holds what converting them whole would give."""

import os
from concurrent.futures import ThreadPoolExecutor

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir_convert.errors import UserError
from ir_convert.export.onnx import weights
from ir_convert.export.onnx.int4 import Int4, int4_tensors, quantise
from ir_convert.export.onnx.weights import LazyWeight

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def content(tensor: ir.TensorProtocol, folder) -> bytes:
    """Returns what a tensor writes to a file, behind something else."""
    path = folder / "data"
    with path.open("wb") as file:
        file.seek(13)
        tensor.tofile(file)
    return path.read_bytes()[13:]


def stored(tensor: Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).numpy())


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=2)
    | st.lists(st.integers(0, 12), min_size=3, max_size=3)
    | st.sampled_from([[1, 300], [300, 1], [0, 300], [300, 0]]),
    source=FLOATS,
    dtype=FLOATS,
    transpose=st.booleans(),
    piece=st.sampled_from([1, 64, 1000, 1 << 18]),
)
def test_pieces_are_the_whole(tmp_path_factory, shape, source, dtype, transpose, piece):
    transpose = transpose and len(shape) == 2
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source)
    expected = (tensor.T if transpose else tensor).to(dtype).contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE", piece)
        patch.setattr(weights, "BEHIND", 100)
        lazy = LazyWeight("w", tuple(shape), lambda: tensor, dtype, transpose)
        assert tuple(lazy.shape) == tuple(expected.shape)
        assert content(lazy, tmp_path_factory.getbasetemp()) == stored(expected)
        assert lazy.tobytes() == stored(expected)


def test_rows_of_a_larger_tensor(tmp_path):
    """A packed projection's rows, or columns of them, are no memory of their own."""
    packed = torch.randn(6, 10)
    for part in (packed[2:4], packed[:, 3:7], packed.T):
        for transpose in (False, True):
            lazy = LazyWeight("w", tuple(part.shape), lambda part=part: part, torch.float32, transpose)
            assert content(lazy, tmp_path) == stored(part.T if transpose else part)


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_wrong_is_named(tmp_path, monkeypatch, transpose):
    monkeypatch.setattr(weights, "PIECE", 64)
    large = torch.ones(70, 40)
    large[69, 39] = 1e6
    bad = LazyWeight("w", (70, 40), lambda: large, torch.float16, transpose)
    with pytest.raises(UserError, match="tensor 'w' holds values that are not finite in float16"):
        content(bad, tmp_path)
    other = LazyWeight("w", (40, 70), lambda: large, torch.float16, transpose)
    with pytest.raises(UserError, match=r"tensor 'w' has shape \[70, 40\]; \[40, 70\] was expected"):
        content(other, tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be advised")
def test_large_tensors_are_sent_to_the_disk_on_the_way(tmp_path, monkeypatch):
    advised = []
    monkeypatch.setattr(weights, "BEHIND", 1 << 12)
    monkeypatch.setattr(weights, "PIECE", 1 << 10)
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: advised.append(call[1:]))
    small, large = (LazyWeight("w", (size,), lambda size=size: torch.ones(size), torch.float32) for size in (100, 4096))
    content(small, tmp_path)
    assert not advised
    content(large, tmp_path)
    # All that the file has so far; it begins behind 13 bytes.
    assert advised == [(0, 13 + (1 << 12) * part, os.POSIX_FADV_DONTNEED) for part in (1, 2, 3, 4)]


def test_parts_of_a_quantised_weight_are_written_by_threads(tmp_path):
    reads = []
    weight = torch.randn(256, 320)

    def read() -> Tensor:
        reads.append(1)
        return weight

    tensors = int4_tensors("w", (256, 320), read, Int4("rtn_asym"), torch.float32)
    with ThreadPoolExecutor(3) as threads:
        found = dict(zip(tensors, threads.map(lambda tensor: tensor.tobytes(), tensors.values()), strict=True))
    assert found == {part: stored(tensor) for part, tensor in quantise(weight, Int4("rtn_asym")).parts().items()}
    assert len(reads) == 1

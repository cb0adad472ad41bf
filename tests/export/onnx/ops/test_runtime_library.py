"""How the runtime chooses a library of native kernels: found, named, none; and which models keep their own functions."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.choices import INT4_METHODS
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.export.onnx.int4 import Int4
from ir_convert.export.onnx.ops import building, level, supported
from ir_convert.export.onnx.ops import library as built
from ir_convert.export.onnx.ops.library import VARIABLE
from ir_convert.runtime import OnnxModel
from ir_convert.runtime import library as choosing
from ir_convert.runtime.library import choose, usable
from ir_convert.runtime.loading import Model, inspect

CPU = ["CPUExecutionProvider"]
CUDA = ["CUDAExecutionProvider", *CPU]
IDS = np.random.default_rng(3).integers(3, 131, (2, 9))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Writes a random model once for each way to quantise it; returns its folder."""
    base = tmp_path_factory.mktemp("base")
    save_random("llama", base)
    checkpoint = Checkpoint.open(str(base))
    folders = {}

    def folder(int4: Int4 | None = None, dtype: torch.dtype = torch.float32):
        if (int4, dtype) not in folders:
            folders[int4, dtype] = tmp_path_factory.mktemp("onnx")
            write(checkpoint, random_routing(checkpoint), folders[int4, dtype], "ir-tiny.onnx", dtype, int4=int4)
        return folders[int4, dtype]

    return folder


def units(library, dtype="float32", **changed) -> Model:
    """A model that calls RoutedMLP as the library has it, but for what is changed: the inputs of functions."""
    mlp = supported(library)[CPU[0], "ir", "RoutedMLP", "float32"]
    return Model({}, {("ir", "RoutedMLP"): mlp, **{("ir", k): v for k, v in changed.items()}}, dtype, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_found_and_registered(export, library, monkeypatch, dtype):
    folder = export(dtype=dtype)
    assert inspect(folder / "ir-tiny.onnx").head_dim == 8
    own = OnnxModel.load(folder, CPU, threads=1)
    assert own.library is None  # the tests' environment names none
    monkeypatch.setenv(VARIABLE, str(library))
    native = OnnxModel.load(folder, CPU, threads=1)
    assert native.library == library
    expected = own.logits(IDS)
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * np.abs(expected).max()
    np.testing.assert_allclose(native.logits(IDS), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", INT4_METHODS)
def test_int4(export, library, monkeypatch, dtype, method):
    """Units in int4; decisions too, where floats are float32."""
    folder = export(Int4(method), dtype)
    own = OnnxModel.load(folder, CPU, threads=1).logits(IDS)
    monkeypatch.setenv(VARIABLE, str(library))
    native = OnnxModel.load(folder, CPU, threads=1)
    assert native.library == library
    # With float16, and with fractional zero points, ONNX Runtime's products leave activations as they are; ours round them.
    rounds = dtype == torch.float32 and method != "hqq"
    error = (np.abs(native.logits(IDS) - own).max(-1) / np.abs(own).max()).astype(np.float32)  # of each token
    assert error.max() <= 1e-2 if rounds else np.median(error) <= 5e-2  # then a decision may fall differently


def test_int4_is_for_the_cpu_alone(library):
    functions = {
        ("ir.int4", name): supported(library)[CPU[0], "ir.int4", name, "float32"] for name in ("Decide", "RoutedMLP")
    }
    model = Model({}, functions, "float32", 64)
    assert usable(library, model, CPU)
    assert not usable(library, replace(model, dtype="float16"), CPU)  # its decisions would be in float16
    assert not usable(library, model, CUDA)


def test_what_a_library_can_run(library):
    assert usable(library, units(library), CPU)
    assert usable(library, units(library, "float16"), CPU)
    assert usable(library, units(library, RoutedMoE=("h",)), CPU)  # a name that it lacks stays a function


def test_what_a_library_lacks(library):
    inputs = units(library).functions["ir", "RoutedMLP"]
    assert not usable(library, units(library, "bfloat16"), CPU)
    assert not usable(library, units(library, RoutedMLP=inputs[:-1]), CPU)
    assert not usable(library, units(library, RoutedMLP=(*inputs, "new")), CPU)
    assert not usable(library, units(library, DenseMLP=("h",)), CPU)
    assert not usable(library, Model({}, {}, "float32", 64), CPU)
    assert not usable(library, units(library), ["AnotherExecutionProvider", *CPU])


def test_named_library_that_cannot_run_the_model(library):
    inputs = units(library).functions["ir", "RoutedMLP"]
    with pytest.raises(
        UserError, match=r"has no kernel of ir::RoutedMLP for bfloat16 on CPUExecutionProvider: leave it out"
    ):
        choose(library, units(library, "bfloat16"), CPU)
    with pytest.raises(UserError, match="with the inputs that this model has: they are of another version"):
        choose(str(library), units(library, RoutedMLP=inputs[:-1]), CPU)
    assert choose(library, Model({}, {}, "float32", 64), CPU) == library  # nothing of it would run or is harmed


@pytest.fixture
def gpu(library, monkeypatch):
    """Gives the library kernels for CUDA too; returns what sets the GPU's capability, or has torch see no GPU at None."""
    table = supported(library)
    more = {(CUDA[0], *key): inputs for (_, *key), inputs in table.items()}
    monkeypatch.setattr(choosing, "supported", lambda _: table | more)

    def see(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return see


def test_gpus_that_the_kernels_are_for(library, gpu):
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0), None):
        gpu(capability)
        assert usable(library, units(library), CUDA)
    gpu((7, 5))
    assert usable(library, units(library), CPU)
    assert not usable(library, units(library), CUDA)
    with pytest.raises(
        UserError, match=r"for float32 on CUDAExecutionProvider below compute capability 8.0: the GPU has 7.5"
    ):
        choose(library, units(library), CUDA)
    assert choose(library, Model({}, {}, "float32", 64), CUDA) == library  # nothing of it would run


def test_heads_that_the_cuda_kernels_are_for(library, gpu):
    gpu(None)
    functions = {
        ("ir", name): supported(library)[CPU[0], "ir", name, "float32"] for name in ("RoutedMLP", "DenseAttention")
    }
    for head_dim in (8, 80, 160, 256):
        assert usable(library, Model({}, functions, "float32", head_dim), CUDA)
    for head_dim in (100, 264):
        model = Model({}, functions, "float32", head_dim)
        assert usable(library, model, CPU)
        assert usable(library, replace(units(library), head_dim=head_dim), CUDA)  # an MLP has no heads
        assert not usable(library, model, CUDA)
        said = f"has no kernel of ir::DenseAttention for float32 on {CUDA[0]} in heads of {head_dim} components, but of"
        with pytest.raises(UserError, match=said):
            choose(library, model, CUDA)


def test_a_built_library_is_of_its_sources_and_machine(tmp_path, monkeypatch):
    """Others have another place: what was built for these is not taken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(built.SOURCES, tmp_path / "ops")
    first = built.location()
    monkeypatch.setattr(built, "SOURCES", tmp_path / "ops")
    assert built.location() == first
    found = {first}
    for suffix in (".txt", ".h", ".cpp", ".cuh", ".cu"):
        source = next(path for path in sorted((tmp_path / "ops").rglob("*")) if path.suffix == suffix)
        source.write_text(source.read_text() + "\n")
        found.add(built.location())
    assert len(found) == 6
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert built.location() not in found


def test_environment(library, monkeypatch, tmp_path):
    model = units(library)
    monkeypatch.setenv(VARIABLE, str(library))
    assert choose(None, model, CPU) == library
    assert choose(False, model, CPU) is None
    monkeypatch.setenv(VARIABLE, "")
    assert choose(None, model, CPU) is None
    assert choose(library, model, CPU) == library
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(UserError, match=f"{VARIABLE} names '.*none.so', where there is no file"):
        choose(None, model, CPU)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing has been built
    assert choose(None, model, CPU) is None


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="nobody is the user to become")
def test_a_cache_folder_that_is_closed(tmp_path):
    """To a service that runs as another user than the folder's."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = "import os; from ir_convert.export.onnx.ops import find; os.setuid(65534); print(find())"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    for place in (
        {"XDG_CACHE_HOME": str(closed)},
        {"XDG_CACHE_HOME": "", "HOME": str(closed)},
        {"XDG_CACHE_HOME": "", "HOME": "~"},
    ):
        done = subprocess.run([sys.executable, "-c", code], env=environment | place, capture_output=True, text=True)
        assert done.stdout == "None\n", done.stderr


def test_what_cannot_be_built_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_compile", None)  # not even begun
    with pytest.raises(UserError, match=r"give it a place \(--out\)"):
        building.build(sanitize=True)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x.so", Path("/proc/x/y.so")):
        with pytest.raises(UserError, match=f"cannot write {out}: "):
            building.build(out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_library(library, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"library '.*none.so' does not exist: build it"):
        choose(tmp_path / "none.so", units(library), CPU)
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setenv(VARIABLE, str(text))
    with pytest.raises(UserError, match=r"text.so is not a library of native kernels"):
        choose(None, units(library), CPU)
    with pytest.raises(UserError, match=r"text.so is not a library of native kernels"):
        level(text)
    source, old = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" const char* IrOpsTable() { return "CPUExecutionProvider RoutedMLP float32 h\\n"; }')
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(old), str(source)], check=True)
    with pytest.raises(UserError, match=r"old.so is of another version: build it again"):
        choose(old, units(library), CPU)


@pytest.mark.skipif(sys.platform == "darwin", reason="libraries there are not ELF files")
@pytest.mark.parametrize("part", [0.001, 0.5, 0.9999])
def test_cut_short(library, part, tmp_path):
    """Not to be loaded: it would kill the process."""
    whole, short = library.read_bytes(), tmp_path / "short.so"
    size = int(len(whole) * part)
    short.write_bytes(whole[:size])
    said = rf"short.so is cut short, {size} of {len(whole)} bytes: copy it again, or build it again"
    with pytest.raises(UserError, match=said):
        choose(short, units(library), CPU)
    with pytest.raises(UserError, match=said):
        level(short)


# Registers the library twice, with a table of functions that do nothing and two versions of it; prints what the second said.
TWO_VERSIONS = """
import ctypes, sys

Nothing = ctypes.CFUNCTYPE(ctypes.c_void_p)
nothing = Nothing(lambda: None)
said = []
status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda code, text: said.append(text.decode()) or 1)
table = (ctypes.c_void_p * 512)(*[ctypes.cast(nothing, ctypes.c_void_p).value] * 512)
table[0] = ctypes.cast(status, ctypes.c_void_p).value
library = ctypes.CDLL(sys.argv[1])
library.RegisterCustomOps.restype = ctypes.c_void_p
for version in (b"1.31.0", b"1.31.0", b"1.31.1"):
    api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda _: ctypes.addressof(table))
    name = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda text=ctypes.c_char_p(version): ctypes.cast(text, ctypes.c_void_p).value)
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(function, ctypes.c_void_p).value for function in (api, name)))
    print(library.RegisterCustomOps(None, base), said)
"""


def test_two_versions_in_one_process(library):
    """Its kernels call the functions of the one that came first."""
    done = subprocess.run([sys.executable, "-c", TWO_VERSIONS, library], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["None []"] * 2
    assert "1 ['the library of domain ir serves ONNX Runtime 1.31.0 in this process, this is 1.31.1" in done.stdout

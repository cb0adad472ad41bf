"""Fixtures shared by all tests."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from models import CONFIGS, make_random, save_random
from quicker_export import install
from trained import Converted

from ir_convert import cli
from ir_convert.errors import UserError
from ir_convert.export.onnx.ops import build
from ir_convert.export.onnx.ops.library import VARIABLE, location

# Tests are of the models' own functions, but for those that ask for the native kernels: a built library must not creep in.
os.environ.setdefault(VARIABLE, "")
# The models are tiny: more threads cost more than they give, a hundredfold where the cores are busy; here, and in processes
# that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
LONGEST = ("test_quality.py", "test_job.py", "test_without_gpu.py", "test_attention.py")

install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files so that two processes wait for each other least: first those whose few tests take minutes, one of which makes
    the converted model; the others that need it last; between them the largest first.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def needs(path: Path) -> bool:
        return any("converted" in getattr(item, "fixturenames", ()) for item in files[path])

    def place(path: Path) -> tuple[int, bool, int]:
        first = LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST)
        return first, needs(path), -len(files[path])

    order = sorted(files, key=place)
    items[:] = [item for path in order for item in files[path]]


@pytest.fixture(scope="session", params=list(CONFIGS))
def random_model(request, tmp_path_factory):
    """(family name, transformers model, checkpoint, routing), for every family."""
    return make_random(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The tiny trained model, converted by the command line: see ``trained.Converted``."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist every process has a folder of its own in a common one.
    return Converted.shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random model without a tokenizer."""
    path = tmp_path_factory.mktemp("base") / "model"
    save_random("llama", path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ir-convert", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def library() -> Path:
    """The native kernels that the environment names (with sanitizers, say), or else those built by the first to come here."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("the native kernels need CMake and a C++ compiler")
    if (built := location()) is None:
        pytest.skip("this user has no home folder")
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(built.parent / "lock"):
        if not built.is_file():
            try:
                build(cuda="auto")
            except UserError as error:
                pytest.fail(str(error))
    return built

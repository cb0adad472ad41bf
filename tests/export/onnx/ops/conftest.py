"""The library of native kernels, as it is built now."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from ir_convert.errors import UserError
from ir_convert.export.onnx.ops import build
from ir_convert.export.onnx.ops.library import VARIABLE, location


@pytest.fixture(scope="session")
def library() -> Path:
    """The library that the environment names (one with sanitizers), or else one built by the first process to come here."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("the native kernels need CMake and a C++ compiler")
    built = location()
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(built.parent / "lock"):
        if not built.is_file():
            try:
                build(cuda="off")
            except UserError as error:
                pytest.fail(str(error))
    return built

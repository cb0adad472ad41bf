"""What is said after a conversion."""

from pathlib import Path

import pytest

from ir_convert.convert import Conversion
from ir_convert.export.onnx import ops
from ir_convert.report import written
from ir_convert.routing import Curve, Routing

HINT = f"ONNX files run faster with native kernels, which are not built yet: {ops.BUILD}"


@pytest.mark.parametrize(
    ("name", "built", "named", "hint"),
    [
        ("m.onnx", False, None, True),
        ("m.onnx", True, None, False),
        ("m.onnx", False, "", False),  # whoever wants none is told nothing
        ("checkpoint", False, None, False),
    ],
)
def test_native_kernels_that_are_not_built_are_named(name, built, named, hint, tmp_path, monkeypatch):
    library = tmp_path / "lib.so"
    monkeypatch.setattr("ir_convert.export.onnx.ops.library.location", lambda: library)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    if built:
        library.touch()
    if named is not None:
        monkeypatch.setenv(ops.VARIABLE, named)
    routing = Routing({}, Curve([0.0], [0.0]), {"sparsity": 0.4, "test": {"asked": 0.4}})
    lines = written(Conversion(routing, {Path(name): 2_500_000}, 61.2))
    assert lines == [f"wrote {name}  2.5 MB", "time 61 s", *([HINT] if hint else [])]

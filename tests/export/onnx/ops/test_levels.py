"""The CPU kernels for every level of the instruction set that this processor has, each in a process of its own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from op_random import quantised, random_attention, random_decide, random_mlp
from op_session import Session

from ir_convert.export.onnx.int4 import Int4
from ir_convert.export.onnx.ops import level
from ir_convert.export.onnx.ops.library import LEVEL, VARIABLE

LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4", "x86-64-v4-vnni")  # each has all that those before it have


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels are x86-64's")
@pytest.mark.parametrize("name", LEVELS)
def test_level(library, name):
    best = level(library)
    if LEVELS.index(name) > LEVELS.index(best):
        pytest.skip(f"this processor is {best}")
    command = [sys.executable, __file__, str(library)]
    done = subprocess.run(command, env={**os.environ, LEVEL: name}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]


def test_unknown_level(library):
    command = [sys.executable, "-m", "ir_convert.export.onnx.ops", "find"]
    environment = {**os.environ, LEVEL: "x86-64-v9", VARIABLE: str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"error: {LEVEL} names 'x86-64-v9'")


def check_units(library: Path) -> None:
    """Holds units of all kinds against float64, with 1 to 21 tokens and rows that no vector divides."""
    for length, execute in ((1, "all"), (6, "random"), (21, "one")):
        rng = np.random.default_rng(length)
        for dtype in (np.float32, np.float16):
            mlp = random_mlp(rng, 1, length, 80, 176, execute, ("gate_bias", "post_norm"), dtype)
            attention = random_attention(rng, 1, length, 40, 3, (6, 2), 48, 80, execute, dtype=dtype, softcap=5.0)
            units = [mlp, attention, random_decide(rng, 1, length, 80, 12, execute=execute, dtype=dtype)]
            units += [quantised(unit, Int4(method)) for unit in (mlp, attention) for method in ("rtn", "rtn_asym")]
            if dtype == np.float32:
                units.append(random_decide(rng, 1, length, 80, 12, execute=execute, int4=Int4()))
            for unit in units:
                unit.check(Session(unit, library, constant=True).run(unit))


if __name__ == "__main__":
    print(level(Path(sys.argv[1])))
    check_units(Path(sys.argv[1]))

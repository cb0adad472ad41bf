"""What is installed is whole: editable installs would hide what is missing."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_all_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for top in ("ir_convert", "export") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.parts).replace("export", "ir_convert.export", 1) for folder in folders}
    assert names == set(listed)


def test_wheel_without_a_compiler(tmp_path):
    """It holds the kernels' sources, to be built where there is a compiler; itself it needs none."""
    source, nothing = tmp_path / "source", tmp_path / "bin"
    nothing.mkdir()
    source.mkdir()
    for part in ("ir_convert", "export"):  # a build leaves its own folder beside them
        shutil.copytree(ROOT / part, source / part)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, str(source)], env=os.environ | {"PATH": str(nothing)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ir_convert/export/onnx/ops/")}
    ops = ROOT / "export" / "onnx" / "ops"
    wanted = {".py", ".txt", ".h", ".cpp", ".cuh", ".cu"}
    sources = {path.relative_to(ops).as_posix() for path in ops.rglob("*") if path.suffix in wanted}
    assert {name.removeprefix("ir_convert/export/onnx/ops/") for name in names} == sources

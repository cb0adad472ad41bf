"""Builds the library with CMake and the machine's C++ compiler; with CUDA kernels, where there is nvcc."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ir_convert.errors import UserError
from ir_convert.files import sync

from .library import NAME, SOURCES, location


def build(out: Path | None = None, cuda: str = "auto", sanitize: bool = False) -> Path:
    """Builds the library, and puts it in place when it is whole.

    Args:
        out: the file to write; by default where ``find`` looks.
        cuda: whether to build the CUDA kernels: ``on``, ``off``, or ``auto``: where nvcc is found.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        The library's path.

    Raises:
        UserError: no compiler, or it fails.
    """
    if shutil.which("cmake") is None:
        raise UserError("building the native kernels needs CMake 3.24 (pip install cmake) and a C++ compiler")
    out = out or location()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ir-ops-") as folder:
        options = [f"-DIR_CUDA={cuda.upper()}", f"-DIR_SANITIZE={'ON' if sanitize else 'OFF'}"]
        _run("cmake", "-S", str(SOURCES), "-B", folder, *options)
        _run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))
        # Copied beside its place first, so that it appears there at once, also from another file system.
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{NAME}.", delete=False) as copy:
            shutil.copyfile(Path(folder) / NAME, copy.name)
        Path(copy.name).chmod(0o755)
        sync(Path(copy.name))
        Path(copy.name).replace(out)
        sync(out.parent)
    return out


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()[-1:]
        raise UserError(f"building the native kernels failed: {said[0].strip() if said else ' '.join(command)}")

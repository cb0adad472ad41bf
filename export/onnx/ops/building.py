"""Builds the library with CMake and the machine's C++ compiler; with CUDA kernels, where there is nvcc."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ir_convert.errors import UserError, reason
from ir_convert.files import expanded, sync

from .library import NAME, SOURCES, location

CONTEXT = 4  # lines of a failed build that its error shows
HEADERS = "IR_ORT_HEADERS"  # names a folder of ONNX Runtime's own headers: holds the binding of its C API against them
STRICT = "IR_STRICT"  # makes warnings errors


def build(out: Path | None = None, cuda: str = "auto", sanitize: bool = False) -> Path:
    """Builds the library, and puts it in place when it is whole.

    Args:
        out: the file to write; by default where ``find`` looks.
        cuda: whether to build the CUDA kernels: ``on``, ``off``, or ``auto``: where nvcc is found.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; needs ``out``.

    Returns:
        The library's path.

    Raises:
        UserError: no compiler, or it fails; ``out`` cannot be written; the environment names a folder of headers that has none.
    """
    if shutil.which("cmake") is None:
        raise UserError("building the native kernels needs CMake 3.24 (pip install cmake) and a C++ compiler")
    if sanitize and out is None:
        raise UserError(
            "a library with sanitizers ends every process that did not start with them: give it a place (--out)"
        )
    out = location() if out is None else expanded(out)
    if out is None:
        raise UserError("this user has no home folder, in which loads would look: give the library a place (--out)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # What is built is copied beside its place first, so that it appears there at once, also from another file system.
        with (
            tempfile.TemporaryDirectory(prefix="ir-ops-") as folder,
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{NAME}.") as beside,
        ):
            _compile(folder, cuda, sanitize)
            copy = Path(shutil.copyfile(Path(folder) / NAME, Path(beside) / NAME))
            copy.chmod(0o755)
            sync(copy)
            copy.replace(out)
            sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    return out


def _compile(folder: str, cuda: str, sanitize: bool) -> None:
    """Has CMake build the library in a folder."""
    options = [f"-DIR_CUDA={cuda.upper()}", f"-DIR_SANITIZE={'ON' if sanitize else 'OFF'}"]
    options.append(f"-D{STRICT}={'ON' if os.environ.get(STRICT) else 'OFF'}")
    if headers := os.environ.get(HEADERS):
        if not (Path(headers) / "onnxruntime_c_api.h").is_file():
            raise UserError(f"{HEADERS} names '{headers}', where there is no onnxruntime_c_api.h")
        options.append(f"-D{HEADERS}={Path(headers).resolve()}")
    _run("cmake", "-S", str(SOURCES), "-B", folder, *options)
    _run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"building the native kernels failed: {_first_error(done.stdout) or ' '.join(command)}")


def _first_error(output: str) -> str:
    """Returns the first error in a build's output with the lines that follow it, or else the last lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    # A compiler's own error says more than CMake's, which may come before it.
    for sign in (": error", "CMake Error", "error"):
        if found := [i for i, line in enumerate(lines) if sign in line]:
            return "\n".join(lines[found[0] : found[0] + CONTEXT])
    return "\n".join(lines[-CONTEXT:])

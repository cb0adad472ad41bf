"""Where the built library lies, and what it has kernels for."""

import ctypes
import hashlib
import os
import platform
import struct
from functools import cache
from pathlib import Path

import ir_convert
from ir_convert.errors import UserError

SOURCES = Path(__file__).parent
SUFFIXES = (".txt", ".h", ".cpp", ".cuh", ".cu")
NAME = "libir_ops.dylib" if platform.system() == "Darwin" else "libir_ops.so"
VARIABLE = "IR_CONVERT_OPS"  # names a library to use in place of the built one; empty: none
BUILD = "python -m ir_convert.export.onnx.ops build"
LEVEL = "IR_CONVERT_OPS_LEVEL"  # names the best level of the instruction set that kernels may be for


def location() -> Path | None:
    """Returns where ``build`` puts the library of these very sources: a folder of the user's own, which may not exist.

    None for a user without a home.
    """
    digest = hashlib.sha256(f"{ir_convert.__version__} {platform.system()} {platform.machine()}".encode())
    for source in sorted(path for path in SOURCES.rglob("*") if path.suffix in SUFFIXES):
        digest.update(source.relative_to(SOURCES).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if caches.startswith("~") else Path(caches) / "ir-convert" / "ops" / digest.hexdigest()[:16] / NAME


def find() -> Path | None:
    """Returns the library that the environment names, which may be none, or else the built one; None where there is none.

    Raises:
        UserError: the environment names what is no file.
    """
    if (named := os.environ.get(VARIABLE)) is not None:
        if named and not os.path.isfile(named):
            raise UserError(f"{VARIABLE} names '{named}', where there is no file that can be read")
        return Path(named) if named else None
    built = location()
    return (
        built if built and os.path.isfile(built) else None
    )  # Path's raises where the folder is closed to this process


@cache
def supported(library: Path) -> dict[tuple[str, str, str, str], tuple[str, ...]]:
    """Returns what a library has kernels for: the inputs it takes by (execution provider, domain, function, type), such
    as ``("CPUExecutionProvider", "ir", "RoutedMLP", "float16")``.

    Raises:
        UserError: it cannot be loaded, or is not a library of this kind and version.
    """
    lines = [line.split() for line in _said(library, "IrOpsTable").splitlines()]
    if any(line[1].partition(".")[0] != "ir" for line in lines):  # an earlier version named no domains
        raise UserError(f"{library} is of another version: build it again ({BUILD})")
    return {(provider, domain, name, kind): tuple(inputs) for provider, domain, name, kind, *inputs in lines}


def level(library: Path) -> str:
    """Returns the level of the instruction set that a library's CPU kernels are for in this process: ``x86-64-v3``.

    Raises:
        UserError: the environment names one that the library or this processor does not have; or as ``supported``.
    """
    if not (name := _said(library, "IrOpsLevel")):
        raise UserError(f"{LEVEL} names '{os.environ.get(LEVEL)}', which this processor or the library does not have")
    return name


def _said(library: Path, name: str) -> str:
    """Returns what a library says of itself in the function of this name."""
    try:
        if (size := library.stat().st_size) < (whole := _whole_size(library)):
            raise UserError(
                f"{library} is cut short, {size} of {whole} bytes: copy it again, or build it again ({BUILD})"
            )
        function = ctypes.CDLL(str(library.resolve()))[name]
    except (OSError, AttributeError) as error:
        raise UserError(f"{library} is not a library of native kernels: {error}") from error
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _whole_size(library: Path) -> int:
    """Returns the bytes that a library has at the least by its own header: to load less of an ELF file kills the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":  # the loader refuses what is no library, or not of 64 bits
        return 0
    (start,) = struct.unpack_from("<Q", header, 0x28)  # of the section headers, which linkers write last
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return int(start + size * count)

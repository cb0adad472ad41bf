"""Keeps two runs from making the same output at once."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from .errors import UserError, reason
from .outputs import Output


@contextmanager
def alone(outputs: Sequence[Output]) -> Iterator[None]:
    """Keeps other runs from these outputs and their work folders, inside a ``with`` block.

    Raises:
        UserError: another run is at work there, or nothing can be written there.
    """
    with ExitStack() as held:
        for output in dict.fromkeys(outputs):
            held.enter_context(_locked(output))
        yield


@contextmanager
def _locked(output: Output) -> Iterator[None]:
    path = output.path.parent / f".{output.path.name}.work.lock"
    with _opened(path, output) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
            others = not _is_at(lock, path)  # its last holder may have removed it since it was opened
        except BlockingIOError:
            others = True
        except OSError:  # a file system without locks
            others = False
        if others:
            raise UserError(f"another run is making {output.path}: wait for it, or name another output")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _opened(path: Path, output: Output) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {output.path}: {reason(error)}") from error

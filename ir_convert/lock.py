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
    with _taken(path, output) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
            # Its last holder may have removed it since it was opened: then it keeps nobody away.
            mine = path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks
            mine = True
        if not mine:
            raise UserError(f"another run is making {output.path}: wait for it, or name another output")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path, output: Output) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {output.path}: {reason(error)}") from error

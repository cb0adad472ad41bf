"""The work folder: what a calibration has finished, layer by layer, so that a killed run goes on where it stopped.

Every finished step is a small safetensors file, written whole; hidden states are raw files that a step reads while the next
one's are written. A step counts as done once its file is there, and by then its hidden states are on the disk. Without a
folder everything stays in memory, and nothing can be resumed. Where processes share the work, each has a folder of its own,
and a step counts as done once all of them have it: a run that was killed when some were a step ahead goes on together.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import reserve, sync
from .team import Team

Result = dict[str, Tensor]


class States:
    """Hidden states ``shape`` (fp32, blocks first), in a file or in memory; slices of blocks are read and written."""

    def __init__(self, shape: tuple[int, ...], path: Path | None = None) -> None:
        self.shape, self._path = shape, path
        self._memory = torch.empty(shape) if path is None else None

    def __getitem__(self, rows: slice) -> Tensor:
        # A mapping of their own for each access: pages of one that stays open would count as the process's memory.
        return self._memory[rows] if self._memory is not None else torch.from_numpy(np.array(self._map("r")[rows]))

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        if self._memory is not None:
            self._memory[rows] = values
        else:
            self._reserve()
            self._map("r+")[rows] = values.numpy()

    def __len__(self) -> int:
        return self.shape[0]

    def finish(self) -> None:
        """Makes sure that what was written is on the disk."""
        if self._path:
            sync(self._path)

    def discard(self) -> None:
        self._memory = None
        if self._path:
            self._path.unlink(missing_ok=True)

    def _reserve(self) -> None:
        """Makes the file; not before it is written, for of those that a finished step read nobody needs any more."""
        if self._path and not (self._path.is_file() and self._path.stat().st_size == 4 * math.prod(self.shape)):
            with open(self._path, "wb") as file:
                reserve(file, 4 * math.prod(self.shape))

    def _map(self, mode: str) -> np.ndarray:
        return np.memmap(self._path, np.float32, mode, shape=self.shape)  # type: ignore[call-overload]


class Work:
    """Steps done and hidden states on the way.

    Args:
        folder: where to keep them, this process's own; None for memory alone.
        team: the processes that share the work.
    """

    def __init__(self, folder: Path | None = None, team: Team | None = None) -> None:
        self.folder, self._team = folder, team or Team()
        self.resumed = 0  # steps that an earlier run had done
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether an earlier run finished a step."""
        return self.folder is not None and any(self.folder.glob("*.safetensors"))

    def states(self, name: str, shape: tuple[int, ...]) -> States:
        """Opens hidden states; those of an earlier run keep their content."""
        return States(shape, self.folder / f"{name}.states" if self.folder else None)

    def load(self, step: str) -> Result | None:
        """Returns what a step gave, or None if it is not done."""
        if not self.folder:
            return None
        result = _read(self.folder / f"{step}.safetensors")
        if not self._team.agree(result is not None):
            return None
        self.resumed += 1
        return result

    def save(self, step: str, result: Result) -> None:
        """Records a step as done; on return all processes have, and what only that step needed may go."""
        if not self.folder:
            return
        temporary = self.folder / f"{step}.tmp"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in result.items()}, temporary)
        sync(temporary)
        temporary.replace(self.folder / f"{step}.safetensors")
        sync(self.folder)
        self._team.wait()

    def once(self, step: str, compute: Callable[[], Result]) -> Result:
        """Returns what a step gave, computing it where it is not done."""
        result = self.load(step)
        if result is None:
            result = compute()
            self.save(step, result)
        return result

    def clear(self) -> None:
        """Removes the folder: the work has become a result."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path) -> Result | None:
    """Returns a finished step; None where it is not there, or a failing disk has left no more than a part of it."""
    try:
        return load_file(file) if file.is_file() else None
    except SafetensorError:
        return None

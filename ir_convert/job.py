"""One conversion as a job: what it depends on, where its unfinished work lies, and whether it was done before."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import UserError
from .lock import alone
from .outputs import Output
from .routing import Routing
from .stream import Team, Work

JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """Everything that decides what comes out, by the names that the user knows.

    Attributes:
        values: what decides what the calibration gives: model, data, options.
        writing: what decides how that is written; an interrupted run goes on where only this has changed.
    """

    values: dict[str, Any]
    writing: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.values | self.writing, sort_keys=True).encode()).hexdigest()

    def did(self, output: Output, checkpoint: Checkpoint) -> bool:
        """Tells whether an output stands there, none of its files missing, and was made by this very job."""
        if not output.is_whole(checkpoint):
            return False
        try:
            return Routing.load(output.routing_file).metadata.get("job_sha256") == self.sha256
        except UserError:
            return False

    @staticmethod
    def folder(output: Output) -> Path:
        """Returns where unfinished work lies: beside the output."""
        return output.path.parent / f".{output.path.name}.work"

    def work(self, output: Output, restart: bool, team: Team) -> Work:
        """Opens the work folder beside the output, where an interrupted run of this job goes on.

        Raises:
            UserError: another job was interrupted there.
        """
        folder = self.folder(output)
        team.wait()
        if team.rank == 0:
            if restart:
                self.clear(output)
            self._claim(folder)
        team.wait()
        return Work(folder if team.size == 1 else folder / f"process-{team.rank}")

    def clear(self, output: Output) -> None:
        """Removes the work folder; if that is interrupted, what is left of it is nobody's."""
        (self.folder(output) / JOB).unlink(missing_ok=True)
        Work(self.folder(output)).clear()

    def forget(self, output: Output, team: Team) -> None:
        """Removes what a run of this job has left that was killed when all was written."""
        if team.rank == 0 and (folder := self.folder(output)).is_dir():
            with alone([output]):
                if _begun(folder) in (None, self._values):
                    self.clear(output)

    @property
    def _values(self) -> Any:
        """The values as they are read from a file."""
        return json.loads(json.dumps(self.values))

    def _begin(self, folder: Path) -> None:
        Work(folder).clear()
        folder.mkdir(parents=True)
        (folder / JOB).write_text(json.dumps(self.values, indent=2) + "\n", "utf-8")

    def _claim(self, folder: Path) -> None:
        before, now = _begun(folder), self._values
        if before is None:
            return self._begin(folder)
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed and not any(folder.rglob("*.safetensors")):  # it failed before there was anything to go on from
            self._begin(folder)
        elif changed:
            differences = ", ".join(_difference(name, before.get(name), now.get(name)) for name in changed)
            raise UserError(
                f"an interrupted run waits in {folder}, but {differences}: run its command again to go on, or give --restart"
            )


def _begun(folder: Path) -> Any:
    """Returns the values of the job that a work folder is of; None where none had begun, or was killed as it wrote them."""
    try:
        return json.loads((folder / JOB).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _difference(name: str, before: Any, now: Any) -> str:
    """Says what became of a value; a digest tells nobody anything."""
    if isinstance(now, str) and re.fullmatch("[0-9a-f]{64}", now):
        return f"{name} is not what it was"
    return f"{name} was {before}, is now {now}"

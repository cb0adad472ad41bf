"""A routing file of an earlier conversion, in place of a calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .calibrate import Options
from .checkpoint import Checkpoint
from .errors import UserError
from .progress import Reporter
from .routing import Routing
from .settings import changes

# Of what may be asked for, what is of a calibration alone.
OF_CALIBRATION = (
    "calibration",
    "text_field",
    "tokens",
    "block_size",
    "restart",
    *(field.name for field in fields(Options)),
)


def reuse(path: Path, checkpoint: Checkpoint, sparsity: float | None, report: Reporter) -> Routing:
    """Reads a routing file made for this very model, and moves its dial to another sparsity if asked.

    Raises:
        UserError: damaged, made for other weights, or out of the sparsity's reach.
    """
    routing = Routing.load(path)
    if absent := [name for name in ("base_model", "weights_sha256", "sparsity") if name not in routing.metadata]:
        raise UserError(f"the routing file {path} is damaged (its metadata has no {absent[0]}): calibrate again")
    if (made_for := routing.metadata["weights_sha256"]) != checkpoint.weights_sha256:
        raise UserError(
            f"{path} was made for other weights ({routing.metadata['base_model']}, sha256 {made_for[:12]}...) than "
            f"{checkpoint.name}: name the model it was made for, or calibrate again"
        )
    routing.metadata.pop("job_sha256", None)  # what comes of it is another command's
    if sparsity is not None:
        threshold = routing.curve.at(sparsity)
        routing.metadata |= {"sparsity": sparsity, "threshold": threshold if sparsity else None}
    before = routing.metadata.get("config")  # older files do not say
    if before and (changed := changes(before, checkpoint.config)):
        report.note(
            f"config.json is not what {path} was calibrated with: {'; '.join(changed)}. Calibrate again, or expect another "
            "sparsity and quality than it says."
        )
    return routing


def require_no_calibration(path: Path, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UserError where something is asked of a calibration that the routing file takes the place of.

    Args:
        path: the routing file.
        given: what ``convert`` was called with.
        defaults: what that is by default.
    """
    ignored = [name for name in OF_CALIBRATION if name != "sparsity" and _plain(given[name]) != _plain(defaults[name])]
    if ignored:
        flags = ", ".join(flag(name) for name in ignored)
        raise UserError(f"{flags}: of a calibration, whose place --routing {path} takes: leave them out")


def flag(name: str) -> str:
    """Returns the command's option that an argument of ``convert`` is."""
    return f"--{name.replace('_', '-')}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

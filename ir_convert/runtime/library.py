"""Which library of native kernels takes over a model's units."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..export.onnx.ops import find, supported
from .loading import Model

DOMAIN = "ir"


def choose(library: str | Path | bool | None, model: Model, providers: Sequence[str]) -> Path | None:
    """Returns the library to register for a model; None for none.

    Args:
        library: one that is wanted in any case; None for the one that has been built, where it is usable; False for none.
        model: what the library has to run.
        providers: execution providers, best first.

    Raises:
        UserError: the library that is wanted does not exist, or the one that has been built is damaged.
    """
    if library is False:
        return None
    if isinstance(library, str | Path):
        if not Path(library).is_file():
            raise UserError(
                f"library '{library}' does not exist: build it (python -m ir_convert.export.onnx.ops build)"
            )
        return Path(library)
    found = find()
    return found if found is not None and usable(found, model, providers) else None


def usable(library: Path, model: Model, providers: Sequence[str]) -> bool:
    """Tells whether a library can run a model's units, as the model's version of them was and on its device.

    Once a library is registered, ONNX Runtime runs no function whose name the library has, be it for another device or type.
    A name that it lacks altogether, such as a mixture's of experts, stays a function.
    """
    table = supported(library)
    known = {name for _, name, _ in table}
    units = {name: inputs for (domain, name), inputs in model.functions.items() if domain == DOMAIN and name in known}
    return bool(units) and all(table.get((providers[0], name, model.dtype)) == inputs for name, inputs in units.items())

"""Which library of native kernels takes over a model's units."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..export.onnx.ops import BUILD, find, supported
from .gpu import CUDA, cuda
from .loading import Model

_LEAST_CAPABILITY = (8, 0)  # of the oldest GPUs that CUDA kernels are built for
_MOST_COMPONENTS = 256  # of a head, in CUDA kernels of attention


def choose(library: str | Path | bool | None, model: Model, providers: Sequence[str]) -> Path | None:
    """Returns the library to register for a model; None for none.

    Args:
        library: one that is wanted in any case; None for the one that has been built, where it is usable; False for none.
        model: what the library has to run.
        providers: execution providers, best first.

    Raises:
        UserError: the library that is wanted does not exist or cannot run the model, or one is damaged.
    """
    if library is False:
        return None
    if isinstance(library, str | Path):
        wanted = Path(library)
        if not wanted.is_file():
            raise UserError(f"library '{library}' does not exist: build it ({BUILD})")
        if missing := lacking(wanted, model, providers):
            raise UserError(f"library '{library}' has no {missing}: leave it out, and the model's own functions run")
        return wanted
    found = find()
    return found if found is not None and usable(found, model, providers) else None


def usable(library: Path, model: Model, providers: Sequence[str]) -> bool:
    """Tells whether a library can run some of a model's functions, and all of those that it has a name for."""
    return bool(_taken(library, model)) and lacking(library, model, providers) is None


def lacking(library: Path, model: Model, providers: Sequence[str]) -> str | None:
    """Returns what a library would have to have to run a model, in words; None if it lacks nothing.

    Once a library is registered, ONNX Runtime runs no function whose name the library has, be it for another device or type.
    A name that it lacks altogether, such as a mixture's of experts, stays a function.
    """
    table = supported(library)
    for (domain, name), inputs in _taken(library, model).items():
        kernel = f"kernel of {domain}::{name} for {model.dtype} on {providers[0]}"
        if (known := table.get((providers[0], domain, name, model.dtype))) is None:
            return kernel
        if known != inputs:
            return f"{kernel} with the inputs that this model has: they are of another version"
        if providers[0] == CUDA and (unfit := _unfit(name, model)):
            return f"{kernel} {unfit}"
    return None


def _unfit(name: str, model: Model) -> str | None:
    """Returns for what CUDA kernels are not, in words, where it is so here; None where they fit, or torch sees no GPU."""
    if (gpu := cuda()) is not None and (capability := gpu.get_device_capability(0)) < _LEAST_CAPABILITY:
        has, needs = (".".join(map(str, of)) for of in (capability, _LEAST_CAPABILITY))
        return f"below compute capability {needs}: the GPU has {has}"
    if "Attention" in name and (model.head_dim % 8 != 0 or model.head_dim > _MOST_COMPONENTS):
        return f"in heads of {model.head_dim} components, but of 8, 16, ... {_MOST_COMPONENTS}"
    return None


def _taken(library: Path, model: Model) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns the model's functions that a library has a name for, with their inputs."""
    known = {(domain, name) for _, domain, name, _ in supported(library)}
    return {function: inputs for function, inputs in model.functions.items() if function in known}

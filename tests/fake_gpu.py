"""A GPU that is none: tensors say that they lie there and are on the CPU, and what would fail on a GPU fails here.

An operation of a tensor there and one here is refused as torch refuses it, so code that forgets to move something is found
without a GPU. It is a device type of its own, ``gpu``, for the whole process: tests use it in processes of their own. In
what operations compute, and in when they do, it is the CPU.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}  # by indices that may lie here
ANSWERS = {"_local_scalar_dense", "equal", "allclose"}  # a number or a truth value, not a tensor
MATH = 0  # the plain attention, of which there are no kernels by device


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", backend_module=_Backend())
GPU = torch.device("gpu", 0)


class There(torch.Tensor):
    """A tensor on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "There":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=GPU)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def tolist(self) -> list:
        return self.inner.tolist()


class _Everywhere(TorchDispatchMode):
    """Sees operations of no tensor, or of tensors here, as well: they may make one there."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _run(operator, args: tuple, kwargs: dict):
    name = operator._schema.name.partition("::")[2]
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    _check(operator, name, args, tensors, there)
    if name == "_fused_sdp_choice":
        return MATH
    goes = bool(there)
    if (device := kwargs.get("device")) is not None:
        goes = torch.device(device).type == "gpu"
        kwargs = kwargs | {"device": torch.device("cpu")} if goes else kwargs
    if name == "histc" and not args[0].is_floating_point():  # GPUs count integers, too
        args = (args[0].float(), *args[1:])
    result = operator(
        *_with(There, _inner, args), **{key: _with(There, _inner, value) for key, value in kwargs.items()}
    )
    if name in ANSWERS or not goes:
        return result
    known = {id(tensor.inner): tensor for tensor in there}  # what is changed in place comes back as itself
    return _with(torch.Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else There(tensor), result)


def _check(operator, name: str, args: tuple, tensors: list[torch.Tensor], there: list[There]) -> None:
    if not there or len(there) == len(tensors) or name in COPIES:
        return
    if name in INDEXING:
        wrong = [] if isinstance(args[0], There) else [args[0]]
    else:
        wrong = [
            tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()
        ]  # numbers may lie anywhere
        if name.endswith("_") and not isinstance(args[0], There):
            wrong.append(args[0])
    if wrong:
        shapes = [list(tensor.shape) for tensor in wrong]
        raise RuntimeError(f"Expected all tensors to be on the same device: {operator} found {shapes} on the CPU")


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _with(kind: type, change: Callable, value):
    """Returns an operation's argument or result with ``change`` done to what is of this kind. (PyTorch's trees take thrice as long.)"""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_with(kind, change, part) for part in value)
    return value


def _inner(tensor: There) -> torch.Tensor:
    return tensor.inner


@contextmanager
def gpu() -> Iterator[None]:
    """Inside, ``device="gpu"`` can be used as that of a GPU."""
    plain = torch.Generator

    class Generator(plain):
        def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
            return plain.__new__(cls, "cpu")

    only = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its tensor here first
    torch.Generator = Generator
    try:
        with _Everywhere():
            yield
    finally:
        torch.Generator = plain
        torch._C._set_only_lift_cpu_tensors(only)

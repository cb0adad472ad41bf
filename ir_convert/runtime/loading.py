"""Finds a model's files and sees that they are whole, before a session reads them."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from ..errors import UserError, one_line
from ..export.onnx.ops import BUILD
from ..files import onnx_files
from .gpu import CUDA, cuda

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_WITH_LIBRARY: "WeakSet[ort.SessionOptions]" = WeakSet()  # options that hold a library, for as long as they live


def model_file(path: Path) -> Path:
    if path.is_dir():
        files = onnx_files(path)
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} .onnx files: name the one to load")
        return files[0]
    if not path.is_file():
        raise UserError(f"model file '{path}' does not exist")
    return path


def end_tokens(path: Path) -> frozenset[int]:
    """Returns the tokens that end a text, by the configuration files beside a model; warns where there are none."""
    files = [path.with_name(name) for name in ("generation_config.json", "config.json")]
    if not any(file.is_file() for file in files):
        warnings.warn(f"no config.json lies beside {path}: no token ends a text, unless you give eos_ids", stacklevel=3)
    for file in files:
        try:
            ids = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {one_line(error)}") from error
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def open_session(
    path: Path, options: ort.SessionOptions, providers: Sequence[str], library: Path | None
) -> ort.InferenceSession:
    """Opens a session, where there is a library with its native kernels: the options hold them from then on.

    Raises:
        UserError: the options hold native kernels already, or ONNX Runtime cannot load the model.
    """
    held = "these session options hold native kernels already: give every load options of its own"
    if options in _WITH_LIBRARY:
        raise UserError(held)
    if CUDA in providers:
        cuda()  # loads the libraries that the provider needs
    try:
        if library is not None:
            options.register_custom_ops_library(str(library.resolve()))
            _WITH_LIBRARY.add(options)
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        said = str(error).splitlines()[0]
        if "Domain already set" in said:  # the caller registered a library
            raise UserError(f"{held}, or library=False to keep the kernels that they hold") from error
        newer = f"; this is version {ort.__version__}, and a newer one may" if "Unrecognized attribute" in said else ""
        raise UserError(f"ONNX Runtime cannot load {path}: {said}{newer}") from error


@dataclass(frozen=True)
class Model:
    """What a model file says of itself.

    Attributes:
        metadata: see ``ir_convert.export.onnx.metadata``.
        functions: by (domain, name), the inputs of each function that it holds.
        dtype: of its units: ``float32``, ``float16`` or ``bfloat16``.
        head_dim: of its attention: how many components a head has.
    """

    metadata: dict[str, Any]
    functions: dict[tuple[str, str], tuple[str, ...]]
    dtype: str
    head_dim: int


def choose_providers(asked: Sequence[str] | str | None, path: Path, model: Model) -> list[str]:
    """Returns the execution providers to run a model with, best first: those asked for, or else what there is.

    Raises:
        UserError: onnxruntime does not have one, or they cannot run the model.
    """
    wanted = [asked] if isinstance(asked, str) else list(asked or _providers())
    if unknown := [name for name in wanted if name not in ort.get_available_providers()]:
        known = ", ".join(ort.get_available_providers())
        raise UserError(f"onnxruntime has no provider '{unknown[0]}' here, but: {known}")
    if model.dtype == "bfloat16" and wanted == ["CPUExecutionProvider"]:
        raise UserError(f"{path} is bfloat16, which ONNX Runtime runs on GPUs alone: convert with --dtype float32")
    return wanted


def _providers() -> list[str]:
    """Returns CUDA where there is a GPU, and the CPU."""
    gpu = CUDA in ort.get_available_providers() and cuda() is not None
    return [CUDA] * gpu + ["CPUExecutionProvider"]


def warn_if_slow(model: Model, providers: Sequence[str], library: Path | None) -> None:
    """Warns the caller's caller of what will be slow here, and says what to do about it."""
    steps = {name for _, name in model.functions} & {"RoutedAttention", "DenseAttention"}
    if providers[0] == CUDA and model.dtype == "float32" and library is None and steps:
        warnings.warn(
            "ONNX Runtime has GroupQueryAttention on GPUs for float16 and bfloat16 alone: every step of this float32 model "
            f"takes its keys and values to the CPU. Convert with --dtype float16, or build the native kernels ({BUILD})",
            stacklevel=3,
        )


def inspect(path: Path) -> Model:
    """Reads a model but for its weights, and checks that these are there."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or is damaged") from error
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if "ir_convert" not in properties:
        raise UserError(f"{path} was not written by ir-convert: it has no routing to set")
    for tensor in proto.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            continue
        data = path.parent / where["location"]
        if not data.is_file():
            raise UserError(f"{path} needs its weights '{where['location']}' beside it: copy the folder as a whole")
        if data.stat().st_size < int(where.get("offset", 0)) + int(where.get("length", 0)):
            raise UserError(f"{data} is shorter than {path.name} says: copy the folder as a whole again")
    caches = [value.type.tensor_type for value in proto.graph.output if value.name.startswith("present.")]
    ((element, head_dim),) = {(cache.elem_type, cache.shape.dim[3].dim_value) for cache in caches}
    functions = {(function.domain, function.name): tuple(function.input) for function in proto.functions}
    return Model(json.loads(properties["ir_convert"]), functions, _DTYPES[element], head_dim)

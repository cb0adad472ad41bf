"""``config.pbtxt``: what Triton's ONNX Runtime backend must know of a model in its repository."""

from collections.abc import Iterable
from pathlib import Path

import onnx

from ir_convert.files import sync

CONFIG = "config.pbtxt"
TYPES: dict[int, str] = {  # what the backend takes; bfloat16 it does not
    onnx.TensorProto.BOOL: "TYPE_BOOL",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}

# No name: Triton takes the folder's, so that the folder can be renamed.
_CONFIG = """\
# For Triton's ONNX Runtime backend. A call runs S new tokens of B texts, after P tokens of each that earlier calls have
# left in present.*; the caller hands these back as past_key_values.*. At first P = 0.
# routing_saved is the share of the layers' FLOPs that the call saved.

backend: "onnxruntime"
default_model_filename: "{model}"

# 0: all texts of a call share P, so Triton must not merge calls; and only so may an input be optional.
max_batch_size: 0

instance_group [ {{ kind: KIND_AUTO, count: 1 }} ]

# 0 is ONNX Runtime's own choice: all cores.
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "0" }} }}

# Native kernels of the routed units; without them the model runs on ONNX Runtime's own.
# model_operations {{ op_library_filename: "/absolute/path/to/the/library.so" }}

input [
{inputs}
]
output [
{outputs}
]
"""
_TENSOR = '  {{ name: "{name}", data_type: {type}, dims: [ {dims} ]{optional} }}'


def write(folder: Path, model: Path) -> None:
    """Writes ``config.pbtxt`` into a model's folder.

    Args:
        folder: the folder; it is to be moved into a model repository when it is whole.
        model: the model file in it, in a folder that is named by its version.
    """
    text = config(onnx.load(folder / model, load_external_data=False), model.name)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for path in (folder / CONFIG, folder):
        sync(path)


def config(model: onnx.ModelProto, name: str) -> str:
    """Returns ``config.pbtxt`` for a model in a file of this name; inputs that have a default are optional."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    inputs, outputs = _tensors(model.graph.input, defaults), _tensors(model.graph.output, set())
    return _CONFIG.format(model=name, inputs=inputs, outputs=outputs)


def _tensors(values: Iterable[onnx.ValueInfoProto], defaults: set[str]) -> str:
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in tensor.shape.dim]
        optional = ", optional: true" if value.name in defaults else ""
        lines.append(
            _TENSOR.format(name=value.name, type=TYPES[tensor.elem_type], dims=", ".join(dims), optional=optional)
        )
    return ",\n".join(lines)

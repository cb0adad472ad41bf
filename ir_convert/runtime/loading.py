"""Finds a model's files and sees that they are whole, before a session reads them."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError

from ..errors import UserError


def providers() -> list[str]:
    wanted = ["CUDAExecutionProvider"] * torch.cuda.is_available() + ["CPUExecutionProvider"]
    return [provider for provider in wanted if provider in ort.get_available_providers()]


def model_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} .onnx files: name the one to load")
        return files[0]
    if not path.is_file():
        raise UserError(f"model file '{path}' does not exist")
    return path


def inspect(path: Path) -> dict[str, Any]:
    """Reads the model's metadata, and checks that its weights are there, without reading them."""
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
            raise UserError(f"{path} needs its weights '{where['location']}' beside it: copy both files together")
        if data.stat().st_size < int(where.get("offset", 0)) + int(where.get("length", 0)):
            raise UserError(f"{data} is shorter than {path.name} says: copy both files together again")
    return json.loads(properties["ir_convert"])

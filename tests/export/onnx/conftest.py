"""An exported model of every family, beside its torch reference."""

import pytest
from onnx_reference import Reference

from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


@pytest.fixture(scope="session")
def exported(random_model, tmp_path_factory):
    """(the runtime's model, the torch reference) for every family."""
    name, model, checkpoint, routing = random_model
    folder = tmp_path_factory.mktemp(f"{name}-onnx")
    write(checkpoint, routing, folder, "ir-tiny.onnx")
    return OnnxModel.load(folder, threads=1), Reference(model, routing, {})

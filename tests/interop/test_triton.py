"""The folder for Triton's model repository, held against Triton's own schema and its ONNX Runtime backend's rules."""

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from models import random_routing, save_random
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from ir_convert.checkpoint import Checkpoint
from ir_convert.convert import convert
from ir_convert.runtime import OnnxModel

NUMPY = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


@pytest.fixture(scope="module", params=["float32", "float16"])
def served(request, tmp_path_factory):
    """(the model's folder, its configuration, a session on its file), all found as Triton finds them."""
    folder = tmp_path_factory.mktemp("triton")
    save_random("llama-bias", folder / "base")
    random_routing(Checkpoint.open(str(folder / "base"))).save(folder / "r.safetensors")
    name = folder / "model_repository" / "ir-llama"
    convert(str(folder / "base"), [name], target="triton", routing=folder / "r.safetensors", dtype=request.param)
    config = text_format.Parse((name / "config.pbtxt").read_text(), ModelConfig())
    versions = [path for path in name.iterdir() if path.is_dir()]
    assert [path.name for path in versions] == ["1"]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(versions[0] / config.default_model_filename, options)
    return name, config, session


def test_configuration(served):
    _, config, _ = served
    assert (config.backend, config.max_batch_size, config.name) == ("onnxruntime", 0, "")
    assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_AUTO]
    assert config.parameters["intra_op_thread_count"].string_value == "0"
    assert not config.model_operations.op_library_filename


def test_the_place_for_native_kernels(served):
    """Taking the comment's sign away gives a configuration that names the library."""
    folder, _, _ = served
    text = (folder / "config.pbtxt").read_text().replace("# model_operations", "model_operations")
    assert list(text_format.Parse(text, ModelConfig()).model_operations.op_library_filename) == [
        "/absolute/path/to/the/library.so"
    ]


def test_tensors_are_the_models(served):
    """Required inputs are the session's inputs, optional ones its overridable initializers: or Triton refuses to load."""
    _, config, session = served

    def said(tensor: ModelInput | ModelOutput) -> tuple[str, str, list[int]]:
        return tensor.name, type_name(tensor), list(tensor.dims)

    def found(value: ort.NodeArg) -> tuple[str, str, list[int]]:
        dims = [size if isinstance(size, int) else -1 for size in value.shape]
        return value.name, f"TYPE_{np_to_triton_dtype(NUMPY[value.type])}", dims

    assert [said(tensor) for tensor in config.input if not tensor.optional] == list(map(found, session.get_inputs()))
    optional = [tensor for tensor in config.input if tensor.optional]
    assert list(map(said, optional)) == list(map(found, session.get_overridable_initializers()))
    assert [tensor.name for tensor in optional] == ["routing_threshold"]
    assert list(map(said, config.output)) == list(map(found, session.get_outputs()))


def type_name(tensor: ModelInput | ModelOutput) -> str:
    types = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type
    return types.values_by_number[tensor.data_type].name


def test_runs_from_what_the_configuration_says(served):
    """A client that knows the configuration alone: two calls, the second over what the first left, dense and routed."""
    folder, config, session = served
    ours = OnnxModel.load(folder / "1", threads=1)
    shapes = {tensor.name: tensor for tensor in config.input if tensor.name.startswith("past_key_values.")}
    dtype = triton_to_np_dtype(type_name(shapes["past_key_values.0.key"]).removeprefix("TYPE_"))
    names = [tensor.name for tensor in config.output]
    ids = np.random.default_rng(0).integers(3, 131, (2, 9))
    saved = {}
    for threshold in (None, -np.inf):
        past = {name: np.zeros((2, tensor.dims[1], 0, tensor.dims[3]), dtype) for name, tensor in shapes.items()}
        logits = []
        for start, end in ((0, 6), (6, 9)):
            feed = {"input_ids": ids[:, start:end], "attention_mask": np.ones((2, end), np.int64), **past}
            feed["position_ids"] = np.arange(start, end)[None].repeat(2, 0)
            if threshold is not None:
                feed["routing_threshold"] = np.array([threshold], np.float32)
            got = dict(zip(names, session.run(names, feed), strict=True))
            past = {name: got[name.replace("past_key_values", "present")] for name in past}
            logits.append(got["logits"])
        saved[threshold] = float(got["routing_saved"][0])
        if threshold is not None:
            ours.threshold = threshold
        atol = 1e-4 if dtype == np.float32 else 0.1
        np.testing.assert_allclose(np.concatenate(logits, 1), ours.logits(ids), atol=atol)
    assert saved[-np.inf] < 0 < saved[None]  # dense costs what deciding costs

"""The examples of docs/serving.md that need this environment; Triton's over its own protocol, from a stand-in for the server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import pytest
import torch
from google.protobuf import text_format
from models import random_routing, save_random
from optimum.onnxruntime import ORTModelForCausalLM
from snippets import NEW, PROMPT, snippet
from trained import TINY
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from ir_convert.checkpoint import Checkpoint
from ir_convert.convert import convert
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


class StandIn(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one model of a model repository."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        self.session = ort.InferenceSession(folder / "1" / self.config.default_model_filename)

    def ModelConfig(self, request, context):  # noqa: N802
        assert request.name == self.name
        return service_pb2.ModelConfigResponse(config=self.config)

    def ModelInfer(self, request, context):  # noqa: N802
        assert request.model_name == self.name
        feed = {
            tensor.name: np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = service_pb2.ModelInferResponse(model_name=self.name)
        names = [output.name for output in self.config.output]
        for name, array in zip(names, self.session.run(names, feed), strict=True):
            response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, str]:
    """(the folder that holds ``served`` and ``model_repository``, the text that our runtime writes)."""
    folder = tmp_path_factory.mktemp("serving")
    checkpoint = Checkpoint.open(str(TINY))
    routing = random_routing(checkpoint)
    routing.save(folder / "r.safetensors")
    (folder / "served").mkdir()
    write(checkpoint, routing, folder / "served", "ir-qwen.onnx")
    convert(str(TINY), [folder / "model_repository" / "ir-qwen"], target="triton", routing=folder / "r.safetensors")
    model = OnnxModel.load(folder / "served")
    ids = model.tokenizer(PROMPT)["input_ids"]
    new = [int(step[0]) for step in model.generate(np.array([ids]), max_new_tokens=NEW)]
    assert len(new) == NEW
    return folder, model.tokenizer.decode(ids + new)


@pytest.fixture
def server(served) -> Iterator[int]:
    """A port where the model is served."""
    server = grpc.server(ThreadPoolExecutor(1))
    stand_in = StandIn(served[0] / "model_repository" / "ir-qwen")
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield port
    server.stop(0).wait()


def run(code: str, folder: Path, monkeypatch, capsys) -> str:
    monkeypatch.chdir(folder)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    return capsys.readouterr().out.rstrip("\n")


def test_optimum(served, monkeypatch, capsys):
    folder, text = served
    said = run(snippet("serving.md", "optimum"), folder, monkeypatch, capsys)
    assert said.startswith(f"[{text!r}, 'The")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "olmo3", "exaone4", "seed_oss"])
def test_optimum_runs_every_family(name, tmp_path, monkeypatch):
    """As the example makes it, for models whose caches optimum gets wrong by itself."""
    save_random(name, tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    (tmp_path / "served").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "served", "m.onnx")
    ids = np.arange(10, 30).reshape(2, 10)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    expected = np.stack(list(OnnxModel.load(tmp_path / "served").generate(ids, mask, NEW, eos_ids=())), 1)
    lines = snippet("serving.md", "optimum").split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("model = "))
    end = next(number for number, line in enumerate(lines) if line.startswith("inputs = "))
    names: dict = {"ORTModelForCausalLM": ORTModelForCausalLM}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines[start:end]), names)
    said = names["model"].generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    assert np.array_equal(said[:, 10:].numpy(), expected)


def test_triton(served, server, monkeypatch, capsys):
    folder, text = served
    code = snippet("serving.md", "Triton")
    assert code.count("localhost:8001") == 1
    assert run(code.replace("localhost:8001", f"localhost:{server}"), folder, monkeypatch, capsys) == text.rstrip("\n")

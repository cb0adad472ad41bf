"""The examples of docs/serving.md that run in this environment say what our own runtime says."""

import numpy as np
import pytest
from snippets import NEW, PROMPT, snippet

from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


@pytest.fixture(scope="module")
def served(converted, tmp_path_factory):
    """(the folder that holds ``served``, the text that our runtime writes)."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "served").mkdir()
    write(converted.checkpoint, converted.routing, folder / "served", "ir-qwen.onnx")
    model = OnnxModel.load(folder / "served")
    ids = model.tokenizer(PROMPT)["input_ids"]
    new = [int(step[0]) for step in model.generate(np.array([ids]), max_new_tokens=NEW)]
    return folder, model.tokenizer.decode(ids + new), model.tokenizer.decode(new)


def run(heading, folder, monkeypatch, capsys) -> str:
    monkeypatch.chdir(folder)
    exec(compile(snippet("serving.md", heading), heading, "exec"), {"__name__": "snippet"})
    return capsys.readouterr().out


def test_onnx_runtime(served, monkeypatch, capsys):
    folder, text, _ = served
    assert run("ONNX Runtime", folder, monkeypatch, capsys).rstrip("\n") == text.rstrip("\n")


def test_genai(served, monkeypatch, capsys):
    folder, _, continuation = served
    said, _, saved = run("onnxruntime-genai", folder, monkeypatch, capsys).rpartition("\nsaved in the last step: ")
    assert said == continuation
    assert -1 < float(saved.strip("[] \n")) < 1

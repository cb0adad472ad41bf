"""The examples of docs/serving.md that run in this environment say what our own runtime says."""

import shutil
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from snippets import NEW, PROMPT, snippet

from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel


@pytest.fixture(scope="module")
def served(converted, tmp_path_factory):
    """(the folder that holds ``served``; what our runtime makes of it: text, continuation, what the last step saved)."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "served").mkdir()
    write(converted.checkpoint, converted.routing, folder / "served", "ir-qwen.onnx")
    model = OnnxModel.load(folder / "served")
    ids = model.tokenizer(PROMPT)["input_ids"]
    new = [int(step[0]) for step in model.generate(np.array([ids]), max_new_tokens=NEW)]
    return folder, model.tokenizer.decode(ids + new), model.tokenizer.decode(new), model.saved


def execute(heading, folder, monkeypatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names = {"__name__": "snippet"}
    exec(compile(snippet("serving.md", heading), heading, "exec"), names)
    return names


def run(heading, folder, monkeypatch, capsys) -> str:
    execute(heading, folder, monkeypatch)
    return capsys.readouterr().out


def test_own_runtime(served, monkeypatch, capsys):
    folder, *_ = served
    lines = run("ONNX Runtime, with `ir_convert.runtime`", folder, monkeypatch, capsys).splitlines()
    assert len(lines) == NEW
    assert all("% saved" in line for line in lines)
    model = OnnxModel.load(folder / "served", sparsity=0.3)
    alone = model.tokenizer([PROMPT], return_tensors="np")["input_ids"]
    first = [model.tokenizer.decode(token) for token in model.generate(alone, max_new_tokens=NEW)]
    assert [line.startswith(f"[{text!r}, ") for text, line in zip(first, lines, strict=True)] == [True] * NEW


def test_onnx_runtime(served, monkeypatch, capsys):
    folder, text, *_ = served
    assert run("ONNX Runtime", folder, monkeypatch, capsys).rstrip("\n") == text.rstrip("\n")


def test_native_kernels(served, library, monkeypatch):
    folder, *_ = served
    shutil.copy(library, folder / "served" / "libir_ops.so")
    names = execute("Native kernels", folder, monkeypatch)
    model = OnnxModel.load(folder / "served", library=library)
    ids = model.tokenizer(PROMPT)["input_ids"]
    own = model.logits(np.array([ids]))
    past = {value.name: value.shape for value in names["session"].get_inputs() if value.name.startswith("past")}
    feed = {name: np.zeros((1, heads, 0, width), np.float32) for name, (_, heads, _, width) in past.items()}
    tokens = np.array([ids], np.int64)
    feed |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(len(ids))[None]}
    # To the bit: the functions would differ in the last digits.
    np.testing.assert_array_equal(names["session"].run(["logits"], feed)[0], own)
    parameters = og.GeneratorParams(names["model"])
    generator = og.Generator(names["model"], parameters)
    generator.append_tokens(ids)
    np.testing.assert_array_equal(generator.get_output("logits")[0], own[0])


def test_genai(served, monkeypatch, capsys):
    folder, _, continuation, last = served
    said, _, saved = run("onnxruntime-genai", folder, monkeypatch, capsys).rpartition("\nsaved in the last step: ")
    assert said == continuation
    assert float(saved.strip("[] \n")) == pytest.approx(last, abs=1e-4)

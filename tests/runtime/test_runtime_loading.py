"""What loads in the ONNX runtime, with which provider and kernels, and what is said where something does not."""

import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import random_routing, save_random
from transformers import PreTrainedTokenizerFast

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.onnx import write
from ir_convert.runtime import OnnxModel, loading
from ir_convert.runtime.loading import end_tokens, inspect, warn_if_slow


def test_tokenizer_from_the_folder(base, model, tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        _ = model.tokenizer
    from tokenizers import Tokenizer, models

    folder = shutil.copytree(base[1], tmp_path / "with")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    ).save_pretrained(folder)
    assert OnnxModel.load(folder).tokenizer("a").input_ids == [0]
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    loaded.add_special_tokens({"eos_token": "a"})
    loaded.save_pretrained(folder)
    padded = OnnxModel.load(folder).tokenizer(["aa", "a"], padding=True, padding_side="left")
    assert padded.attention_mask == [[1, 1], [0, 1]]


def test_what_does_not_load_says_what_to_do(base, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        OnnxModel.load(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match=r"0 \.onnx files"):
        OnnxModel.load(tmp_path)
    with pytest.raises(UserError, match=r"no provider 'FooProvider' here, but: .*CPUExecutionProvider"):
        OnnxModel.load(base[1], providers=["FooProvider"])
    assert OnnxModel.load(base[1], providers="CPUExecutionProvider").session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="threshold is NaN"):
        OnnxModel.load(base[1], threshold=math.nan)
    with pytest.raises(UserError, match=r"sparsity 0.2 and threshold 1 are given"):
        OnnxModel.load(base[1], sparsity=0.2, threshold=1.0)

    lone = shutil.copyfile(base[1] / "ir-tiny.onnx", tmp_path / "ir-tiny.onnx")
    with pytest.raises(UserError, match=r"needs its weights 'ir-tiny.onnx.data' beside it"):
        OnnxModel.load(lone)
    whole = (base[1] / "ir-tiny.onnx.data").read_bytes()
    (tmp_path / "ir-tiny.onnx.data").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="shorter"):
        OnnxModel.load(lone)

    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"\xff\xfenot a model")
    with pytest.raises(UserError, match="not an ONNX file"):
        OnnxModel.load(noise)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", [x], [y])), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not written by ir-convert"):
        OnnxModel.load(tmp_path / "other.onnx")


def test_an_operator_that_has_learnt_more_since(base, tmp_path):
    folder = shutil.copytree(base[1], tmp_path / "newer")
    proto = onnx.load(folder / "ir-tiny.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "Gather")
    node.attribute.append(onnx.helper.make_attribute("rounding", 4))
    onnx.save(proto, folder / "ir-tiny.onnx")
    version = re.escape(ort.__version__)
    with pytest.raises(
        UserError, match=f"Unrecognized attribute: rounding for operator Gather; this is version {version}, and"
    ):
        OnnxModel.load(folder)


def test_what_lies_beside_is_read_when_it_is_asked_for(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base[1], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    monkeypatch.chdir(folder)
    model = OnnxModel.load("ir-tiny.onnx")
    monkeypatch.chdir("/")
    assert model.eos_ids == {5, 7}
    for beside in ("config.json", "generation_config.json"):
        (folder / beside).unlink(missing_ok=True)
    with pytest.warns(
        UserWarning, match="no config.json lies beside .*: no token ends a text, unless you give eos_ids"
    ):
        assert not OnnxModel.load(folder).eos_ids


@pytest.mark.parametrize("name", ["IR.ONNX", "1/model.onnx"])
def test_the_one_model_of_a_folder(name, base, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    shutil.copyfile(base[1] / "ir-tiny.onnx", file)
    shutil.copyfile(base[1] / "ir-tiny.onnx.data", file.with_name("ir-tiny.onnx.data"))
    assert OnnxModel.load(tmp_path).path == file


def test_the_generation_configurations_end_tokens_come_first(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_tokens(tmp_path / "m.onnx") == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert end_tokens(tmp_path / "m.onnx") == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert end_tokens(tmp_path / "m.onnx") == {2, 7}


def test_threads(base):
    assert OnnxModel.load(base[1], threads=1).session.get_session_options().intra_op_num_threads == 1


def test_a_log_level_that_the_caller_chose_stays(base):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    OnnxModel.load(base[1], options=options)
    assert options.log_severity_level == 4


LIGHT = """
import sys
from ir_convert.runtime import OnnxModel

model = OnnxModel.load(sys.argv[1], ["CPUExecutionProvider"])
with model.hold_sparsity(0.1):
    assert len(list(model.generate([[1, 2, 3]], max_new_tokens=2, eos_ids=[]))) == 2
print(sorted({"torch", "transformers", "onnxscript"} & set(sys.modules)))
"""


def test_runs_without_what_made_the_model(base):
    """Torch and transformers take seconds and hundreds of MB, which who serves tokens on a CPU can do without."""
    done = subprocess.run([sys.executable, "-c", LIGHT, base[1]], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_provider_that_does_not_start(base, monkeypatch):
    """ONNX Runtime goes on without it, on the CPU, where other kernels and precisions are right."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(UserError, match=r"CUDAExecutionProvider does not start here.*providers=\['CPUExec"):
        OnnxModel.load(base[1], both, library=False)
    monkeypatch.setattr(loading, "_providers", lambda: both)
    with pytest.raises(UserError, match="does not start here"):  # in whose options kernels for it may be by now
        OnnxModel.load(base[1], options=ort.SessionOptions())
    asked = []
    monkeypatch.setattr("ir_convert.runtime.model.choose_library", lambda library, *_: asked.append(library))
    for threshold, given in ((1.5, {"threshold": 1.5}), (-math.inf, {"sparsity": 0, "threads": 1, "library": False})):
        with pytest.warns(UserWarning, match="does not start here.*the model runs on the CPU"):
            model = OnnxModel.load(base[1], **given)
        assert model.session.get_providers() == ["CPUExecutionProvider"]
        assert model.threshold == threshold
    assert model.session.get_session_options().intra_op_num_threads == 1
    assert asked == [None, None, False, False]


def test_options_with_native_kernels_serve_one_load(base, library, prompt):
    options = ort.SessionOptions()
    for _ in range(2):
        OnnxModel.load(base[1], threads=1, options=options, library=False)
    model = OnnxModel.load(base[1], threads=1, options=options, library=library)
    for again in (library, False):
        with pytest.raises(UserError, match="session options hold native kernels already: give every load"):
            OnnxModel.load(base[1], threads=1, options=options, library=again)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    with pytest.raises(UserError, match="or library=False to keep the kernels that they hold"):
        OnnxModel.load(base[1], threads=1, options=options, library=library)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    kept = OnnxModel.load(base[1], threads=1, options=options, library=False)
    np.testing.assert_array_equal(kept.logits(prompt), model.logits(prompt))


@pytest.mark.parametrize(
    ("kv_cache", "dtype", "provider", "library", "warned"),
    [
        ("full", torch.float32, "CUDAExecutionProvider", None, True),
        ("full", torch.float32, "CUDAExecutionProvider", Path("libir_ops.so"), False),
        ("full", torch.float16, "CUDAExecutionProvider", None, False),
        ("full", torch.float32, "CPUExecutionProvider", None, False),
        ("strict", torch.float32, "CUDAExecutionProvider", None, False),  # its steps know no GroupQueryAttention
    ],
)
def test_warns_of_slow_steps_on_a_gpu(kv_cache, dtype, provider, library, warned, tmp_path):
    save_random("llama", tmp_path / "base")
    checkpoint, folder = Checkpoint.open(str(tmp_path / "base")), tmp_path / "onnx"
    folder.mkdir()
    write(checkpoint, random_routing(checkpoint, kv_cache=kv_cache), folder, "m.onnx", dtype)
    with warnings.catch_warnings(record=True) as caught:
        warn_if_slow(inspect(folder / "m.onnx"), [provider], library)
    assert [("--dtype float16" in str(warning.message)) for warning in caught] == [True] * warned

"""The code that travels with a checkpoint, in a process that does not know this project."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EVERY, random_routing, save_random
from routed_models import tokens
from transformers import AutoModelForCausalLM

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write, writer
from ir_convert.export.hf.configuration_ir import MODELING_SHA256

FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folders, again = json.loads(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
logits = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        logits[name] = model(ids).logits
    assert "ir_convert" not in sys.modules
    print(name, getattr(sys.modules[type(model).__module__], "MARK", None))
model.set_sparsity(0.2)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
assert reloaded.config.sparsity == 0.2
assert (reloaded.config.kv_cache, reloaded.model.layers[1].self_attn.strict) == ("strict", True)
with torch.no_grad():
    assert reloaded(ids).logits.equal(model.eval()(ids).logits)
    logits["again"] = reloaded(ids).logits
torch.save(logits, again + ".pt")
"""


def code_sha256() -> str:
    folder = Path(writer.__file__).parent
    code = b"".join((folder / name).read_bytes() for name in writer.CODE if name != "configuration_ir.py")
    return hashlib.sha256(code).hexdigest()[:12]


def test_the_configuration_file_names_its_modeling_files():
    """Transformers reuses modeling code across checkpoints whose configuration files are equal."""
    assert code_sha256() == MODELING_SHA256, "write this digest into configuration_ir.py"


def test_the_code_imports_nothing_but_its_neighbours_torch_and_transformers():
    folder = Path(writer.__file__).parent
    for name in writer.CODE:
        for line in (folder / name).read_text("utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                allowed = {"torch", "transformers", "numpy", *sys.stdlib_module_names}
                assert words[1].startswith(".") or words[1].split(".")[0] in allowed, line
                assert not words[1].startswith(".."), line


@torch.no_grad()
def test_fresh_process(tmp_path):
    """Every family in one process, a checkpoint with other code among them; then saved and loaded again."""
    ids = tokens(2, 11)
    folders, expected, last = {}, {}, list(EVERY)[-1]
    for name in EVERY:
        save_random(name, tmp_path / name)
        checkpoint = Checkpoint.open(str(tmp_path / name))
        folder = tmp_path / f"ir-{name}"
        folder.mkdir()
        write(checkpoint, random_routing(checkpoint, kv_cache="strict" if name == last else "full"), folder)
        folders[name], expected[name] = str(folder), load(folder).eval()(ids).logits
    other = tmp_path / "ir-other"
    shutil.copytree(folders["llama"], other)
    with open(other / "modeling_ir.py", "a") as file:
        file.write('\nMARK = "other"\n')
    text = (other / "configuration_ir.py").read_text("utf-8")
    (other / "configuration_ir.py").write_text(text.replace(MODELING_SHA256, "123456789abc"), "utf-8")
    folders = {"other": str(other), **folders}
    expected["other"] = expected["llama"]

    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [json.dumps([folders, str(tmp_path / "again")]), json.dumps(ids.tolist())]
    process = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    marks = dict(line.split() for line in process.stdout.splitlines())
    assert marks == {"other": "other", **dict.fromkeys(EVERY, "None")}
    logits = torch.load(tmp_path / "again.pt")
    again = logits.pop("again")
    assert all(logits[name].equal(expected[name]) for name in logits)
    assert again.equal(load(tmp_path / "again").eval()(ids).logits)


def test_refused_without_trust(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=False)

"""The tiny trained model, converted once for all tests by the real command."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.export import hf
from ir_convert.flops import Budget
from ir_convert.routing import Routing

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny-llama"
TOKENS = 32768


def stdlib_text(part: str) -> str:
    """Returns a part of the demo's text."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "stdlib_text.py", part], check=True, capture_output=True, encoding="utf-8"
    ).stdout


@dataclass
class Converted:
    """What ``ir-convert examples/tiny-llama`` wrote, and the base model beside it.

    Attributes:
        folder: holds ``onnx/ir-tiny.onnx``, ``ir-tiny`` and ``ir-tiny.safetensors``.
        output: what the command printed.
    """

    folder: Path
    output: str

    @classmethod
    def make(cls, folder: Path) -> "Converted":
        calibration = folder / "calibration.txt"
        calibration.write_text(stdlib_text("calibration"), encoding="utf-8")
        outs = ["onnx/ir-tiny.onnx", "ir-tiny", "ir-tiny.safetensors"]
        command = [sys.executable, "-m", "ir_convert", TINY, "--sparsity", "0.25"]
        command += ["--calibration", calibration, "--tokens", str(TOKENS)]
        command += [argument for out in outs for argument in ("--out", folder / out)]
        # One thread: the other core is another test process's.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return cls(folder, done.stdout)

    @classmethod
    def shared(cls, folder: Path) -> "Converted":
        """Returns one that the first test process to come here makes, for all of them."""
        folder.mkdir(exist_ok=True)
        said = folder / "output.txt"
        with FileLock(folder / "lock"):
            if not said.is_file():
                said.write_text(cls.make(folder).output, encoding="utf-8")
        return cls(folder, said.read_text("utf-8"))

    @property
    def onnx(self) -> Path:
        return self.folder / "onnx" / "ir-tiny.onnx"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(str(TINY))

    @cached_property
    def routing(self) -> Routing:
        return Routing.load(self.folder / "ir-tiny.safetensors")

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.checkpoint, torch.device("cpu"))

    @cached_property
    def budget(self) -> Budget:
        return Budget.of(self.checkpoint.config, self.routing.units, self.routing.kv_cache)

    @cached_property
    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    @cached_property
    def routed(self) -> PreTrainedModel:
        return hf.load(self.folder / "ir-tiny", dtype=torch.float32).eval()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.tokenizer

    @cached_property
    def unseen(self) -> torch.Tensor:
        """Token blocks ``[blocks, 512]`` of text that neither training nor calibration saw."""
        ids = self.tokenizer(stdlib_text("test"), verbose=False)["input_ids"]
        return torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)

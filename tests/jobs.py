"""The short calibration of a small model that is interrupted, resumed and repeated, and what two runs of it must share."""

import shutil
import sys
from pathlib import Path

import torch
from trained import TINY
from transformers import AutoModelForCausalLM, LlamaConfig

from ir_convert.files import TOKENIZER_FILES
from ir_convert.routing import Routing

OPTIONS = [
    "--device",
    "cpu",
    "--tokens",
    "3072",
    "--block-size",
    "64",
    "--rank",
    "4",
    "--router-width",
    "4",
    "--sparsity",
    "0.3",
]
TIMES = ("fit_seconds", "calibration_seconds", "peak_memory_bytes")


def save_with_tokenizer(path: Path) -> Path:
    """Saves a random model of four layers with a real tokenizer in ``path`` and returns that."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in TOKENIZER_FILES:
        if (TINY / name).is_file():
            shutil.copy(TINY / name, path)
    return path


def command(model: Path, *outs: Path, launcher: tuple[str, ...] = (sys.executable,)) -> list[str]:
    """Returns the command, whose fits are short."""
    words = [*launcher, str(Path(__file__).with_name("short_command.py")), str(model), *OPTIONS]
    return words + [word for out in outs for word in ("--out", str(out))]


def same(one: Path, other: Path) -> None:
    first, second = Routing.load(one), Routing.load(other)
    assert first.curve == second.curve
    for key, unit in first.units.items():
        for name, tensor in unit.tensors().items():
            assert torch.equal(tensor, second.units[key].tensors()[name]), (key, name)
    for routing in (first, second):
        for name in TIMES:
            assert routing.metadata.pop(name) >= 0
    assert first.metadata == second.metadata
